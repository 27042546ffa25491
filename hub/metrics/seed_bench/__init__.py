"""SEED-Bench."""
