"""The one place that loads a model to ask it something, and asks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from modeling_aligngpt import ALIGN_MODES, AlignGPTForConditionalGeneration, AlignGPTProcessor


DTYPES = ("auto", "float32", "bfloat16", "float16")


class Answer(NamedTuple):
    """
    Attributes:
        text: the answer, without special tokens and surrounding spaces.
        prompt: what the model read, as text.
        align_weights: the weight of each level's embedding, `num_align_levels` numbers.
    """

    text: str
    prompt: str
    align_weights: list[float]


class LoadedModel:
    """
    A model with its processor, on its device, ready to answer.

    Args:
        name: folder or Hub id. revision, attn_implementation: as in transformers.
        dtype: one of `DTYPES`.
        device: the GPU where there is one when `None` or `"auto"`.
        align_level: 0-based level that every answer is steered to.
        align_mode: how the alignment vector is made, in place of what the model's config says.

    Raises:
        ValueError: no model can be loaded there, or a level, mode or dtype that it doesn't have.
    """

    def __init__(
        self,
        name: str,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        device: str | torch.device | None = None,
        attn_implementation: str | None = None,
        align_level: int | None = None,
        align_mode: str | None = None,
    ):
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.")
        if align_mode is not None and align_mode not in ALIGN_MODES:
            raise ValueError(f"align_mode {align_mode!r} is not one of {', '.join(ALIGN_MODES)}.")
        if (Path(name) / "adapter_config.json").is_file():
            raise ValueError(
                f"{name} holds an adapter, not a whole model: `aligngpt merge --adapter {name} --output DIR` makes one."
            )
        if device in (None, "auto"):
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        try:
            self.model = AlignGPTForConditionalGeneration.from_pretrained(
                name,
                revision=revision,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                attn_implementation=attn_implementation,
            )
        except OSError as error:
            raise ValueError(f"--model {name} cannot be loaded ({str(error).strip().splitlines()[0]}).") from error
        self.model.to(self.device).eval()
        self.processor = AlignGPTProcessor.from_pretrained(name, revision=revision)
        self.processor.validate_with(self.model.config)
        levels = self.model.config.num_align_levels
        if align_level is not None and not 0 <= align_level < levels:
            raise ValueError(f"align_level {align_level} is not in 0..{levels - 1}, the model's levels (0-based).")
        self.align_level = align_level
        self.model.config.align_mode = align_mode or self.model.config.align_mode

    def texts(self, chats: Sequence[list[dict[str, Any]]], **options) -> list[str]:
        """What the model reads of each conversation, up to where it answers; `options` go to the chat template."""
        return self.processor.apply_chat_template(list(chats), add_generation_prompt=True, tokenize=False, **options)

    def inputs(self, texts: Sequence[str], images: Sequence | None = None):
        """
        The model's inputs, padded on the left, on its device, pixels in its dtype.

        Args:
            texts: as `texts` gives them. images: PIL images or what `read_image` takes, in the order in which the
                texts name them.
        """
        inputs = self.processor(
            text=list(texts),
            images=list(images) if images else None,
            padding=True,
            padding_side="left",
            add_special_tokens=False,  # the templates write BOS themselves
            return_tensors="pt",
        ).to(self.device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        return inputs

    def answers(self, texts: Sequence[str], images: Sequence | None = None, **settings) -> list[Answer]:
        """
        Answers to a batch of prompts; greedy unless `settings`, which go to `generate`, say otherwise.

        Args:
            texts, images: as in `inputs`. settings: `align_level` among them replaces the one set for all answers.
        """
        if self.align_level is not None:
            settings.setdefault("align_level", self.align_level)
        inputs = self.inputs(texts, images)
        with torch.inference_mode():
            output = self.model.generate(**inputs, **{"do_sample": False, **settings}, return_dict_in_generate=True)
        ids = output.sequences[:, inputs["input_ids"].shape[1] :]
        written = self.processor.batch_decode(ids, skip_special_tokens=True)
        weights = output.align_weights.float().tolist()
        return [Answer(text.strip(), prompt, row) for text, prompt, row in zip(written, texts, weights, strict=True)]
