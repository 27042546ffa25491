"""Pairs scored with CLIP or SigLIP, and scores cut into levels."""
