"""Shared by all AlignGPT classes: supported features, loading in 8 and 4 bits, saving."""

from copy import copy

from transformers import AutoTokenizer
from transformers.modeling_utils import PreTrainedModel

from .configuration_aligngpt import AUTO_MAP, AlignGPTConfig
from .gate_prompt_aligngpt import answer_openings
from .generation_aligngpt import complete_generation_config


# What quantisation leaves as it is, by the beginnings of names: all but the layers of the language model.
UNQUANTIZED = (
    "model.vision_tower",
    "model.multi_modal_projector",
    "model.align_gate",
    "model.align_embeddings",
    "lm_head",
)


_OF_THE_HUB = ("revision", "subfolder", "token", "cache_dir", "local_files_only")


class AlignGPTPreTrainedModel(PreTrainedModel):
    config: AlignGPTConfig
    config_class = AlignGPTConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")  # type: ignore[assignment]
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def is_custom_code(cls) -> bool:
        # transformers skips a tower's own rule for missing weights in code that might overwrite loaded ones: not this
        return False

    @classmethod
    def is_backend_compatible(cls) -> bool:
        """
        Asked by engines that would run this class inside of their own (vLLM's and SGLang's transformers backends).

        Raises:
            ValueError: always. They embed images apart from the prompt, so the gate would not see it.
        """
        raise ValueError(
            "AlignGPT cannot run in this engine's transformers backend: its gate compares images with the prompt, "
            "which is not there. For vLLM install this model's package beside it, which brings a class of its own; for "
            "other engines write a plain LLaVA with `aligngpt export`."
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """
        As transformers'; a `quantization_config` that names no module to leave out gets [`UNQUANTIZED`], which stays in
        the config and is saved with it: kernels of 4 bits take inputs in multiples of 64, and a gate has one for each
        image token (729 with SigLIP). The `answer_openings` that models of 0.1.0 lack come from their tokenizer.
        """
        given = kwargs.get("quantization_config")
        for name in ("llm_int8_skip_modules", "modules_to_not_convert"):
            if given is not None and not isinstance(given, dict) and getattr(given, name, ()) is None:
                kwargs["quantization_config"] = copy(given)
                setattr(kwargs["quantization_config"], name, list(UNQUANTIZED))
        found = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        config = (found[0] if isinstance(found, tuple) else found).config
        if config.gate_context == "first_turn" and config.answer_openings is None:
            kept = {name: kwargs[name] for name in _OF_THE_HUB if name in kwargs}
            config.answer_openings = _openings_beside(pretrained_model_name_or_path, kept)
        return found

    def save_pretrained(self, save_directory, **kwargs):
        """Saves weights, config and code; what is saved names the class of every Auto class (see `AUTO_MAP`)."""
        if getattr(self, "generation_config", None) is not None:
            self.generation_config = complete_generation_config(self.generation_config)
        if kwargs.get("state_dict") is not None and self.config.tie_word_embeddings:
            # FSDP2 and ZeRO-2 gather the head as a tensor of its own, beside the embedding that it is
            tied = set(self._tied_weights_keys or ())
            kwargs["state_dict"] = {name: value for name, value in kwargs["state_dict"].items() if name not in tied}
        sharded, conversions = type(self), self.__dict__.pop("_weight_conversions", None)
        before = getattr(self.config, "auto_map", None)
        self.config.auto_map = dict(AUTO_MAP)
        # FSDP2 puts a class of torch's in front, whose code would be saved; ZeRO-3's loader leaves renamings behind
        self.__class__ = next(cls for cls in sharded.__mro__ if not cls.__module__.startswith("torch."))
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.__class__ = sharded
            self.config.auto_map = before
            if before is None:
                del self.config.auto_map
            if conversions is not None:
                self._weight_conversions = conversions


def _openings_beside(name, hub: dict) -> list[list[int]] | None:
    try:
        # needs no code of the folder; left unsaid, transformers asks the user where there is no tokenizer
        tokenizer = AutoTokenizer.from_pretrained(name, **hub, trust_remote_code=False)
    except (OSError, ValueError, KeyError):  # no tokenizer beside the weights; the last is 4.57's
        return None
    return answer_openings(tokenizer, tokenizer.chat_template)


__all__ = ["UNQUANTIZED", "AlignGPTPreTrainedModel"]
