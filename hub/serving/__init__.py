"""`aligngpt serve`: transformers' OpenAI-compatible server, guarded."""
