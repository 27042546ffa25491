"""`aligngpt levels`: what the alignment levels do in a model."""
