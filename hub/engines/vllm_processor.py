"""
How vLLM prepares a prompt with images for AlignGPT.

The alignment vector depends on the prompt, and vLLM embeds images before and apart from it. So the first image of a
prompt brings along what the gate reads (ids, and the other images), and its embedding is the vector followed by its own
tokens; both places count as its placeholder, and what the vector depends on is part of its hash: no cache, of prefixes
or of embeddings, hands one question's vector to another.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from PIL import Image
from transformers import BatchFeature
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageProcessorItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdateDetails,
)

from modeling_aligngpt import AlignGPTProcessor
from modeling_aligngpt.configuration_aligngpt import AlignGPTConfig, answer_openings, first_turn_end


# levels of an item besides those of a table: the config's mode decides; the image is not the first, and has no vector
BY_MODE, NO_VECTOR = -1, -2
LEVEL_SETTING = "align_level"
# what `apply` knows of the prompt, on its way to the other steps
_PROMPT = "_aligngpt_prompt"


class AlignGPTProcessingInfo(BaseProcessingInfo):
    def get_hf_config(self) -> AlignGPTConfig:
        return self.ctx.get_hf_config()

    def get_hf_processor(self, **kwargs: object) -> AlignGPTProcessor:
        return self.ctx.get_hf_processor(AlignGPTProcessor)

    def parse_mm_data(self, mm_data, **kwargs):
        """As vLLM's, which would make RGB of PIL images in its own way: by our processor first."""
        images = mm_data.get("image")
        if isinstance(images, (Image.Image, list, tuple)):
            read = [
                self.get_hf_processor().read_image(image) if isinstance(image, Image.Image) else image
                for image in (images if isinstance(images, (list, tuple)) else [images])
            ]
            mm_data = {**mm_data, "image": read}
        return super().parse_mm_data(mm_data, **kwargs)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {"image": self.get_hf_config().image_seq_length + 1}


class AlignGPTDummyInputs(BaseDummyInputsBuilder[AlignGPTProcessingInfo]):
    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return self.info.get_hf_processor().image_token * mm_counts.get("image", 0)

    def get_dummy_mm_data(self, seq_len, mm_counts, mm_options):
        size = self.info.get_hf_config().input_image_size
        height, width = (size, size) if isinstance(size, int) else size
        count = mm_counts.get("image", 0)
        return {"image": self._get_dummy_images(width=width, height=height, num_images=count)}


class AlignGPTMultiModalProcessor(BaseMultiModalProcessor[AlignGPTProcessingInfo]):
    """See the module. A prompt's `align_level` comes in `mm_processor_kwargs`."""

    _openings: list[list[int]] | None = None

    def apply(self, inputs, timing_ctx):
        """
        As vLLM's.

        Raises:
            ValueError: a level that the model does not have, an unknown setting, or numbers of images and placeholders
                that differ. The request is refused; the engine goes on.
        """
        config, settings = self.info.get_hf_config(), dict(inputs.hf_processor_mm_kwargs)
        level = settings.pop(LEVEL_SETTING, None)
        if settings:
            raise ValueError(f"mm_processor_kwargs: {', '.join(settings)}: AlignGPT takes {LEVEL_SETTING} alone.")
        if level is not None and (type(level) is not int or not 0 <= level < config.num_align_levels):
            raise ValueError(f"align_level is {level!r}; this model has levels 0 to {config.num_align_levels - 1}.")
        images = inputs.mm_data_items["image"]
        if not isinstance(images, ImageProcessorItems):
            raise ValueError("AlignGPT takes images, not embeddings of images: its gate looks at the whole image.")
        ids = self._with_align(list(inputs.prompt))
        count = ids.count(config.image_token_id)
        if count != len(images):
            raise ValueError(f"The prompt has {count} places for images, and {len(images)} came.")
        prompt = {
            "head": ids[ids.index(config.align_token_id) : ids.index(config.image_token_id) + 1],
            "gate_ids": self._gate_ids(ids) if level is None and config.uses_gate else [],
            "level": BY_MODE if level is None else level,
            # what came to vLLM's server, which has made RGB of it in its own way
            "images": [getattr(image, "original_bytes", image) for image in images.data],
            "items": list(range(len(images))),
        }
        return super().apply(replace(inputs, prompt=ids, hf_processor_mm_kwargs={_PROMPT: prompt}), timing_ctx)

    def _with_align(self, ids: list[int]) -> list[int]:
        """The prompt with `<align>` in front of its first image: behind BOS where the template did not write it."""
        config = self.info.get_hf_config()
        if config.align_token_id not in ids:
            bos = self.info.get_hf_processor().tokenizer.bos_token_id
            at = 1 if ids and ids[0] == bos else 0
            return [*ids[:at], config.align_token_id, *ids[at:]]
        if config.image_token_id in ids and ids.index(config.image_token_id) < ids.index(config.align_token_id):
            raise ValueError("<align> stands behind an image: it belongs in front of everything but BOS.")
        return ids

    def _gate_ids(self, ids: list[int]) -> list[int]:
        """The tokens of the prompt that the gate reads; see `config.gate_context`."""
        config, processor = self.info.get_hf_config(), self.info.get_hf_processor()
        tokenizer, read = processor.tokenizer, ids
        if config.gate_context == "first_turn":
            if self._openings is None:  # a model saved by 0.1.0 does not say
                self._openings = config.answer_openings or answer_openings(tokenizer, processor.chat_template) or []
            read = ids[: first_turn_end(ids, self._openings)]
        if read and read[0] == config.text_config.bos_token_id:
            read = read[1:]
        left_out = {config.image_token_id, config.align_token_id, tokenizer.pad_token_id}
        left_out -= {tokenizer.eos_token_id}  # where padding is EOS, it is an answer's end here
        return [token for token in read if token not in left_out]

    # ---- what the steps of `apply` ask for ----

    def _get_mm_hashes(self, inputs):
        prompt = inputs.hf_processor_mm_kwargs[_PROMPT]
        hashes = super()._get_mm_hashes(replace(inputs, hf_processor_mm_kwargs={}))
        first, *others = hashes["image"]
        algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
        seen = {name: prompt[name] for name in ("head", "gate_ids", "level")}
        return {**hashes, "image": [MultiModalHasher.hash_kwargs(algorithm, own=first, others=others, **seen), *others]}

    def _get_cache_missing_processor_kwargs(self, inputs, mm_is_cached):
        prompt = inputs.hf_processor_mm_kwargs[_PROMPT]
        missing = [item for item, is_cached in enumerate(mm_is_cached["image"]) if not is_cached]
        return {_PROMPT: {**prompt, "items": missing}}

    def _apply_hf_processor_main(self, mm_items, hf_kwargs) -> BatchFeature:
        prompt = hf_kwargs[_PROMPT]
        processor, images, items = self.info.get_hf_processor(), prompt["images"], prompt["items"]
        if not items:
            return BatchFeature()
        shown = {item: images if item == 0 else [images[item]] for item in items}
        read = [processor.read_image(image) for of_item in shown.values() for image in of_item]
        pixels = processor.image_processor(images=read, return_tensors="pt")["pixel_values"]
        gate = [prompt["gate_ids"] if item == 0 else [] for item in items]
        return BatchFeature(
            {
                "pixel_values": pixels,
                "pixel_keys": torch.tensor([_key(each) for each in pixels]),
                "num_pixel_values": torch.tensor([len(of_item) for of_item in shown.values()]),
                # one more than is read: a field of a request is never empty
                "gate_ids": torch.tensor([token for ids in gate for token in [*ids, 0]]),
                "num_gate_ids": torch.tensor([len(ids) + 1 for ids in gate]),
                "align_levels": torch.tensor([prompt["level"] if item == 0 else NO_VECTOR for item in items]),
            }
        )

    def _get_mm_fields_config(self, hf_inputs, hf_processor_mm_kwargs) -> Mapping[str, MultiModalFieldConfig]:
        if not hf_inputs:
            return {}
        by_size, one_each = MultiModalFieldConfig.flat_from_sizes, MultiModalFieldConfig.batched
        return {
            "pixel_values": by_size("image", hf_inputs["num_pixel_values"]),
            "pixel_keys": by_size("image", hf_inputs["num_pixel_values"], keep_on_cpu=True),
            "num_pixel_values": one_each("image", keep_on_cpu=True),
            "gate_ids": by_size("image", hf_inputs["num_gate_ids"]),
            "num_gate_ids": one_each("image", keep_on_cpu=True),
            "align_levels": one_each("image", keep_on_cpu=True),
        }

    def _get_prompt_updates(self, mm_items, hf_processor_mm_kwargs, out_mm_kwargs) -> Sequence[PromptReplacement]:
        config, prompt = self.info.get_hf_config(), hf_processor_mm_kwargs[_PROMPT]
        image = [config.image_token_id]

        def target(item: int) -> list[int]:
            return prompt["head"] if prompt["items"][item] == 0 else image

        def replacement(item: int) -> PromptUpdateDetails:
            ids = [*target(item)[:-1], *image * config.image_seq_length]
            return PromptUpdateDetails.select_token_ids(ids, [config.align_token_id, *image])

        return [PromptReplacement(modality="image", target=target, replacement=replacement)]


def _key(pixels: torch.Tensor) -> int:
    """What an image's tokens are kept under, for other questions about it: 63 bits of a digest of its pixels."""
    digest = hashlib.blake2b(pixels.contiguous().numpy().tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
