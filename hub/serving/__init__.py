"""`aligngpt serve`: a small OpenAI-compatible server on `model.generate`, or vLLM's."""
