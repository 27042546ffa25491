"""LLaVA-Bench (in the wild)."""
