"""Settings of both stages for each backbone, and accelerate's files: found by name, see `aligngpt recipes`."""
