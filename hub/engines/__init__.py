"""Other engines than transformers: vLLM's model class, and a plain LLaVA for engines that run no code of ours."""
