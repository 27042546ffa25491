"""What vLLM calls when it starts (entry point `vllm.general_plugins`): AlignGPT's class, under its name."""

ARCHITECTURE = "AlignGPTForConditionalGeneration"


def register() -> None:
    """Makes AlignGPT known to vLLM, in each of its processes."""
    from vllm import ModelRegistry

    # its config and processor, so that no code of the model's folder is needed
    import modeling_aligngpt  # noqa: F401

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"{__package__}.vllm_model:{ARCHITECTURE}")
