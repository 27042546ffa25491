"""Parts of the processor: a tower's image processor, tokenizer properties, arguments, text edits, saved files."""

import inspect
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin
from transformers.tokenization_utils_base import PreTrainedTokenizerBase


def single_token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """The id of `token`; a ValueError if the tokenizer does not read it as one token."""
    ids = tokenizer.encode(token, add_special_tokens=False)
    if len(ids) != 1 or tokenizer.convert_ids_to_tokens(ids[0]) != token:
        raise ValueError(
            f"The tokenizer has no token {token!r}: add it with "
            f"tokenizer.add_special_tokens({{'additional_special_tokens': [{token!r}]}})."
        )
    return ids[0]


def argument_names(image_processor) -> tuple[str, ...]:
    """What may be given flat to a processor or its chat template: arguments of tokenizer, image processor, template."""
    kinds = (*ProcessingKwargs.__annotations__.values(), getattr(image_processor, "valid_kwargs", None))
    names = [name for kind in kinds for name in getattr(kind, "__annotations__", ())]
    return (
        *ProcessingKwargs.__annotations__,
        *names,
        *inspect.signature(ProcessorMixin.apply_chat_template).parameters,
    )


def a_level_per_row(align_level, input_ids):
    """`(batch,)` levels, of the type of `input_ids`: tensor, array or list."""
    levels = np.asarray(align_level) if np.ndim(align_level) else np.full(len(input_ids), align_level)
    if isinstance(input_ids, torch.Tensor):
        return torch.from_numpy(levels)
    return levels if isinstance(input_ids, np.ndarray) else levels.tolist()


def check_image_counts(images, text: list[str], image_token: str) -> None:
    """Raises a ValueError unless each row has as many images as placeholders, or all rows where `images` are flat."""
    placeholders = [row.count(image_token) for row in text]
    rule = f"the number of {image_token} tokens in the prompts should be the same as the number of images"
    remedy = f"write one {image_token} for each image."
    nested = bool(images) and isinstance(images[0], (list, tuple))
    if nested and len(images) != len(placeholders):
        raise ValueError(f"{len(images)} rows of images for {len(placeholders)} prompts: {rule}; {remedy}")
    if nested or not images:
        counts = [len(row) for row in images] if images else [0] * len(placeholders)
        for row, (wanted, given) in enumerate(zip(placeholders, counts, strict=True)):
            if wanted != given:
                raise ValueError(f"Row {row}: {rule}, but it has {wanted} and {given} images; {remedy}")
    elif sum(placeholders) != len(images):
        raise ValueError(
            f"Rows 0 to {len(placeholders) - 1}: {rule}, but they have {sum(placeholders)} "
            f"({', '.join(map(str, placeholders))}) and {len(images)} images; {remedy}"
        )


def apply_edits(row: str, edits: list[tuple[int, int, str, str]]) -> tuple[str, list[dict]]:
    """`row` with each `(start, end, replacement, type)` carried out, and the record of it."""
    pieces, records, last, length = [], [], 0, 0
    for start, end, replacement, kind in sorted(edits, key=lambda edit: edit[:2]):
        pieces += [row[last:start], replacement]
        length += start - last
        records.append(
            {
                "type": kind,
                "span": (start, end),
                "new_span": (length, length + len(replacement)),
                "text": row[start:end],
                "replacement": replacement,
            }
        )
        length += len(replacement)
        last = end
    return "".join([*pieces, row[last:]]), records


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


def pil_image_processor(image_processor):
    """The PIL form of an image processor, whose pixel values are the authors'; unchanged if it has none."""
    name = type(image_processor).__name__.removesuffix("Fast")
    # transformers 5 has `NamePil` beside `Name` (torchvision), 4.57 `Name` (PIL) beside `NameFast`
    form = getattr(transformers, name + "Pil", None) or getattr(transformers, name, None)
    if form is None or isinstance(image_processor, form):
        return image_processor
    return form.from_dict(image_processor.to_dict())


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


def pair_of(size) -> tuple[int, int] | None:
    return (size, size) if isinstance(size, int) else tuple(size) if size is not None else None


def output_size(image_processor) -> tuple[int, int] | None:
    """Height and width of the images that an image processor gives; `None` if they vary."""
    name = "crop_size" if getattr(image_processor, "do_center_crop", False) else "size"
    size = dict(getattr(image_processor, name, None) or {})
    return (size["height"], size["width"]) if size.get("height") and size.get("width") else None


def portable_tokenizer_config(config: dict) -> None:
    """Names by which both generations read `tokenizer.json` as it is (a family's class may rebuild parts of it)."""
    if "AutoTokenizer" not in config.get("auto_map", {}):
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    for name in ("is_local", "local_files_only"):  # of one load, not of the tokenizer
        config.pop(name, None)


def portable_image_processor_config(config: dict) -> None:
    for name in ("image_processor_type", "image_processor_class"):
        if isinstance(config.get(name), str):
            config[name] = config[name].removesuffix("Fast").removesuffix("Pil")
    config.pop("auto_map", None)  # the processor's, which transformers writes into its parts too


def portable_processor_config(config: dict) -> None:
    if isinstance(config.get("image_processor"), dict):
        portable_image_processor_config(config["image_processor"])


def rewrite_json(path: Path, change) -> None:
    """Applies `change` to a JSON file, if it exists, in one step."""
    if not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    change(config)
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(beside, path)
