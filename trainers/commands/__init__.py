"""The `aligngpt` command line: what users type, and the settings behind it."""
