"""AlignGPT's additions to transformers' `generate`: a fixed prompt for the gate, `align_level`, padding on any side."""

import inspect
from contextvars import ContextVar

import torch
from transformers.generation import GenerationMixin
from transformers.utils import ModelOutput, logging

from .base_aligngpt import cache_in, check_images, check_levels, warn_without_align, warn_without_images
from .compat_v4 import PrefillOnlyImagesMixin
from .configuration_aligngpt import AlignGPTConfig


logger = logging.get_logger(__name__)

# what `generate` carries to this model's `forward`, and a draft model of text alone does not take
_OF_IMAGES = ("pixel_values", "mm_encoder_outputs", "prompt_mask", "align_level")

# what the first pass of the `generate` that runs in this thread gave each level
_align_weights: ContextVar[torch.Tensor | None] = ContextVar("align_weights", default=None)


class AlignGPTGenerationMixin(PrefillOnlyImagesMixin, GenerationMixin):
    """`GenerationMixin` for a model whose gate reads the prompt."""

    config: AlignGPTConfig

    def generate(self, inputs=None, generation_config=None, **kwargs):
        """
        As transformers' `generate`; also takes `align_level` (int or `(B,)`), and rows padded on either side. The gate
        reads the prompt alone: fixed here, so that generated tokens stay out with and without a cache.

        With `return_dict_in_generate=True` the output has `align_weights` `(sequences, N)`, as `forward` gives them for
        the prompt; `None` where that lies in a cache.
        """
        if generation_config is None and kwargs.get("max_length") is not None:
            # the saved limit would win over the caller's
            kwargs.setdefault("max_new_tokens", None)
        # transformers 5 encodes whatever stands under this name, None too
        if "pixel_values" in kwargs and kwargs["pixel_values"] is None:
            kwargs.pop("pixel_values")
        if kwargs.get("align_level") is not None:
            # a level per row is repeated with its row for beams and several returns, one for all is not
            levels = torch.as_tensor(kwargs["align_level"])
            is_one_level = levels.numel() == 1 and not levels.is_floating_point() and levels.dtype != torch.bool
            kwargs["align_level"] = int(levels) if is_one_level else levels
            check_levels(levels.cpu(), self.config.num_align_levels)
        self._check_prompt(kwargs.get("input_ids") if inputs is None else inputs, kwargs)
        mask = self._prompt_mask(inputs, generation_config, kwargs)
        if kwargs.get("prompt_mask") is None:
            kwargs["prompt_mask"] = mask
        if mask is not None and cache_in(kwargs) is None and not bool(mask[:, -1].all()):
            # answers continue at the right end
            logger.warning_once("Rows are padded on the right: generate moves the padding to the left.")
            order = mask.int().argsort(dim=1, stable=True)
            inputs = _reordered(inputs, order)
            for name in ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "prompt_mask"):
                if name in kwargs:
                    kwargs[name] = _reordered(kwargs[name], order)
        before = _align_weights.set(None)
        try:
            output = super().generate(inputs, generation_config, **kwargs)
            if isinstance(output, ModelOutput):
                output["align_weights"] = _per_sequence(_align_weights.get(), len(output.sequences), mask)
            return output
        finally:
            _align_weights.reset(before)

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, **kwargs):
        if _align_weights.get() is None:
            _align_weights.set(outputs.get("align_weights"))
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)

    def generate_batch(self, inputs, *args, **kwargs):
        """
        As transformers' `generate_batch` (continuous batching), for prompts of text: it takes ids alone.

        Raises:
            ValueError: a prompt holds `<image>` or `<align>`, which would be read as words.
        """
        placeholders = {self.config.image_token_id, self.config.align_token_id}
        for number, ids in enumerate(inputs):
            if not placeholders.isdisjoint(ids):
                raise ValueError(
                    f"Prompt {number} of generate_batch holds <image> or <align>, and generate_batch takes no images: "
                    "call generate with all that AlignGPTProcessor returns, or serve the model with vLLM."
                )
        return super().generate_batch(inputs, *args, **kwargs)

    def _get_candidate_generator(self, *args, model_kwargs, assistant_model=None, **kwargs):
        if assistant_model is not None:
            taken = inspect.signature(assistant_model.forward).parameters
            left_out = [name for name in _OF_IMAGES if name not in taken]
            model_kwargs = {name: value for name, value in model_kwargs.items() if name not in left_out}
        return super()._get_candidate_generator(
            *args, model_kwargs=model_kwargs, assistant_model=assistant_model, **kwargs
        )

    def _check_prompt(self, input_ids: torch.Tensor | None, kwargs: dict) -> None:
        """Checks once, before the first step, what `forward` can only assert on a GPU (see `base_aligngpt.py`)."""
        pixel_values = kwargs.get("pixel_values")
        begun = any(kwargs.get(name) is not None for name in ("mm_encoder_outputs", "inputs_embeds"))
        if begun or cache_in(kwargs) is not None or input_ids is None:
            return
        input_ids = input_ids.cpu()
        image_BT = input_ids == self.config.image_token_id
        if pixel_values is None:
            warn_without_images(image_BT)
            return
        check_images(image_BT, len(pixel_values), self.config.image_seq_length)
        warn_without_align(image_BT, input_ids == self.config.align_token_id)

    def _prompt_mask(self, inputs, generation_config, kwargs) -> torch.Tensor | None:
        """The attention mask of the prompt, inferred from its padding as transformers does when none is given."""
        if (attention_mask := kwargs.get("attention_mask")) is not None:
            return attention_mask.bool() if attention_mask.ndim == 2 else None
        if kwargs.get("inputs_embeds") is not None:
            prompt = kwargs["inputs_embeds"]
            return torch.ones(prompt.shape[:2], dtype=torch.bool, device=prompt.device)
        prompt = kwargs.get("input_ids") if inputs is None else inputs
        if prompt is None:
            return None
        # as transformers merges them: arguments first, then the config passed, then the model's own
        configs = [vars(config) for config in (generation_config, self.generation_config) if config is not None]
        pad_token_id, eos_token_id = (
            next((source[name] for source in (kwargs, *configs) if source.get(name) is not None), None)
            for name in ("pad_token_id", "eos_token_id")
        )
        eos_token_ids = eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
        if pad_token_id is None or pad_token_id in eos_token_ids or not bool((prompt == pad_token_id).any()):
            return torch.ones_like(prompt, dtype=torch.bool)
        return prompt != pad_token_id


def _per_sequence(weights: torch.Tensor | None, sequences: int, mask: torch.Tensor | None) -> torch.Tensor | None:
    """One row of `weights` for each sequence returned: prompts are repeated for beams and for several returns."""
    if weights is None or mask is None:
        return weights
    prompts = len(mask)
    return weights[:: len(weights) // prompts].repeat_interleave(sequences // prompts, 0)


def _reordered(values: torch.Tensor | None, order: torch.Tensor) -> torch.Tensor | None:
    """`values` `(B, T, ...)` with positions in `order` `(B, T)`; values of another shape are returned unchanged."""
    if values is None or values.shape[:2] != order.shape:
        return values
    return values[torch.arange(len(order), device=order.device).unsqueeze(1), order]
