"""Other engines than transformers: vLLM's model class, and a plain LLaVA for what runs no code of ours."""
