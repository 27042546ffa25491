"""MMBench."""
