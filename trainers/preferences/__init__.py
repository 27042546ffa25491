"""Tuning a model after stage 2: by preference pairs (DPO) and by rewards (GRPO)."""
