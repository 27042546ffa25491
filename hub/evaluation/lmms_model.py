"""
An AlignGPT as lmms-eval runs it (`--model aligngpt`). Model arguments, besides lmms-eval's own:

    pretrained=ID,revision=SHA,dtype=bfloat16,align_level=7,align_mode=gate,attn_implementation=sdpa,answers=FILE.jsonl

`answers` keeps each answer with its prompt and gate weights as soon as it is there; a run that was stopped and is
started again answers what is missing.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance

from modeling_aligngpt import ALIGN_MODES, AlignGPTForConditionalGeneration, AlignGPTProcessor

from .answers import AnsweringLmms, answer_row, generation_settings
from .store import hash_weights


DTYPES = ("auto", "float32", "bfloat16", "float16")


class AlignGPTLmms(AnsweringLmms):
    """
    See the module.

    Args:
        pretrained (`str`): folder or Hub id. revision (`str`, *optional*): branch, tag or commit on the Hub.
        dtype (`str`): of the weights. device (`str`, *optional*): the GPU where there is one.
        batch_size (`int`): prompts answered at once.
        align_level (`int`, *optional*): 0-based level that every answer is steered to.
        align_mode (`str`, *optional*): the alignment vector, in place of what the model's config says.
        attn_implementation (`str`, *optional*): as in transformers.
        answers (`str`, *optional*): a JSON-lines file that keeps the answers; see the module.

    Raises:
        ValueError: unknown or impossible arguments, or a file of answers that were given in another way.
    """

    def __init__(
        self,
        pretrained: str,
        revision: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        align_level: int | None = None,
        align_mode: str | None = None,
        attn_implementation: str | None = None,
        answers: str | None = None,
        **kwargs,
    ):
        super().__init__()
        if kwargs:
            raise ValueError(f"unknown model argument(s) of aligngpt: {', '.join(sorted(kwargs))}.")
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}.")
        if align_mode is not None and align_mode not in ALIGN_MODES:
            raise ValueError(f"align_mode={align_mode!r} is not one of {', '.join(ALIGN_MODES)}.")
        self.accelerator = Accelerator(cpu=device == "cpu")
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.batch_size = int(batch_size)
        self.device = torch.device(device) if device and self._world_size == 1 else self.accelerator.device
        revision = None if revision is None else str(revision)
        self.model = AlignGPTForConditionalGeneration.from_pretrained(
            pretrained,
            revision=revision,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            attn_implementation=attn_implementation,
        )
        self.model.to(self.device).eval()
        self.processor = AlignGPTProcessor.from_pretrained(pretrained, revision=revision)
        config = self.model.config
        self.processor.validate_with(config)
        levels = config.num_align_levels
        if align_level is not None and not 0 <= align_level < levels:
            raise ValueError(f"align_level={align_level} is not in 0..{levels - 1}, the model's levels (0-based).")
        self.align_level = align_level
        config.align_mode = align_mode or config.align_mode
        self.identity = {
            "model": pretrained if not Path(pretrained).is_dir() else Path(pretrained).resolve().name,
            "revision": getattr(config, "_commit_hash", None),
            "weights": None if getattr(config, "_commit_hash", None) else hash_weights(pretrained),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "align_level": align_level,
            "align_mode": config.align_mode,
            # of each answer's `align_weights`
            "num_align_levels": levels,
        }
        if answers:
            self.keep_answers(answers)

    # ---- answering ----

    def answer_batch(self, requests: Sequence[Instance]) -> Iterator[dict[str, Any]]:
        chats, images = [], []
        for request in requests:
            messages, found = self.messages_of(request)
            chats.append(messages)
            images += found
        texts = self.processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
        # the templates write BOS themselves
        inputs = self.processor(
            text=texts,
            images=images or None,
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_tensors="pt",
        ).to(self.device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        settings, stops = generation_settings(requests[0].args[2])
        if self.align_level is not None:
            settings["align_level"] = self.align_level
        with torch.inference_mode():
            output = self.model.generate(**inputs, **settings, return_dict_in_generate=True)
        ids = output.sequences[:, inputs["input_ids"].shape[1] :]
        written = self.processor.batch_decode(ids, skip_special_tokens=True)
        weights = output.align_weights.float().tolist()
        for request, text, answer, row in zip(requests, texts, written, weights, strict=True):
            yield answer_row(request, text, answer, stops, row)
