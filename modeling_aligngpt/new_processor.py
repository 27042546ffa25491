"""A processor for a new model: a tower's image processor, and a tokenizer with its template."""

import os
from typing import Any

import transformers
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .chat_templates import with_suffix
from .images_aligngpt import WHITE, pair_of
from .processing_aligngpt import AlignGPTProcessor


def processor_from_parts(
    tokenizer: PreTrainedTokenizerBase,
    config,
    *,
    vision_tower: str | os.PathLike | None = None,
    chat_template: str | None = None,
    do_pad: bool = False,
    **kwargs,
) -> AlignGPTProcessor:
    """
    A processor for `config`.

    Args:
        tokenizer: with both placeholders added.
        config ([`AlignGPTConfig`]): image size, positions of an image and placeholder ids come from it.
        vision_tower: checkpoint whose image normalisation is taken; `None`: CLIP's.
        chat_template: the Jinja template.
        do_pad: images padded to a square with the mean colour (stage 2) or as the tower has it (stage 1).
        kwargs: of [`AlignGPTProcessor`], over what follows from the config.

    Raises:
        ValueError: as [`AlignGPTProcessor.validate_with`], or nothing at `vision_tower` says its normalisation.
    """
    image_token = tokenizer.convert_ids_to_tokens(config.image_token_id)
    suffix = infer_image_suffix(tokenizer, image_token)  # type: ignore[arg-type]
    arguments = {
        "chat_template": chat_template and with_suffix(chat_template, suffix, tokenizer),
        "image_token": image_token,
        "align_token": tokenizer.convert_ids_to_tokens(config.align_token_id),
        "image_seq_length": config.image_seq_length,
        "image_suffix": suffix,
        "transparency": WHITE,
    }
    image_processor = image_processor_for(config.input_image_size, vision_tower, do_pad)
    processor = AlignGPTProcessor(image_processor, tokenizer, **{**arguments, **kwargs})
    processor.validate_with(config)
    return processor


def infer_image_suffix(tokenizer: PreTrainedTokenizerBase, image_token: str = "<image>") -> str:
    """
    `" "` for tokenizers that mark the start of a text as a word's start but not what follows a special token (Llama's
    sentencepiece ones), else `""`.
    """

    def first_piece(text: str) -> int:
        return next(i for i in tokenizer(text, add_special_tokens=False)["input_ids"] if i != image_id)

    image_id = tokenizer.convert_tokens_to_ids(image_token)
    alone, behind, spaced = first_piece("a"), first_piece(image_token + "a"), first_piece(image_token + " a")
    return " " if alone != behind and alone == spaced else ""


def image_processor_for(input_image_size, vision_tower, do_pad: bool):
    """[`LlavaImageProcessor`] in its PIL form, for images of `input_image_size`, with the normalisation of a tower."""
    settings: dict[str, Any] = {}
    if vision_tower is not None:
        own = image_settings(vision_tower)
        names = ("image_mean", "image_std", "resample", "rescale_factor", "do_center_crop")
        settings = {name: own[name] for name in names if own.get(name) is not None}
        if "size" in own and "shortest_edge" not in own["size"]:
            settings.setdefault("do_center_crop", False)  # SigLIP: resized to its square, whatever the shape
    height, width = pair_of(input_image_size)  # type: ignore[misc]
    crops = settings.setdefault("do_center_crop", True)
    settings["size"] = {"shortest_edge": max(height, width)} if crops else {"height": height, "width": width}
    settings["crop_size"] = {"height": height, "width": width}
    form = getattr(transformers, "LlavaImageProcessorPil", None) or transformers.LlavaImageProcessor
    return form(do_pad=do_pad, **settings)


def image_settings(vision_tower, revision: str | None = None) -> dict[str, Any]:
    """
    What a tower's image processor is set to; what its file says where its class cannot be had (torchvision).

    Raises:
        ValueError: no file there says the images' mean and standard deviation.
    """
    try:
        return transformers.AutoImageProcessor.from_pretrained(vision_tower, revision=revision).to_dict()
    except (ImportError, OSError, ValueError) as error:
        reason = error
    try:
        settings = transformers.ImageProcessingMixin.get_image_processor_dict(vision_tower, revision=revision)[0]
    except (OSError, ValueError):
        settings = {}
    if not {"image_mean", "image_std"} <= settings.keys():
        raise ValueError(
            f"vision tower {str(vision_tower)!r}: no preprocessor_config.json (or processor_config.json) that says how "
            "images are scaled (image_mean, image_std) can be read there: copy it from where the tower was taken."
        ) from reason
    for name in ("size", "crop_size"):
        if isinstance(side := settings.get(name), int):  # as older files have it
            settings[name] = {"height": side, "width": side}
    return settings


__all__ = ["image_processor_for", "image_settings", "infer_image_suffix", "processor_from_parts"]
