"""
Checks of values that lie in tensors, without making a GPU wait: on CUDA they are asserted on the device, elsewhere they
are read and raise. `generate`, which waits for every token anyway, reads them on any device before it begins. And of
the names of arguments, which `**kwargs` would swallow.
"""

import difflib
import inspect
from collections.abc import Callable, Iterable
from functools import lru_cache

import torch
from transformers.cache_utils import Cache
from transformers.utils import is_torchdynamo_compiling, logging


logger = logging.get_logger(__name__)

# devices on which reading a value means waiting for all work before it
ASYNC_DEVICES = ("cuda",)


def require(condition: torch.Tensor, message, hint: str) -> None:
    """
    Raises a ValueError with `message()` unless `condition` `()` holds; on CUDA the device stops with `hint`, because
    asking would synchronise. Does nothing while a graph is compiled.
    """
    if is_torchdynamo_compiling():
        return
    if condition.device.type in ASYNC_DEVICES:
        torch._assert_async(condition, hint)
    elif condition.device.type != "meta" and not bool(condition):
        raise ValueError(message())


@lru_cache(maxsize=1024)
def _meant(function: Callable, name: str, more: tuple[str, ...]) -> str | None:
    known = [*inspect.signature(function).parameters, *more]
    return None if name in known else next(iter(difflib.get_close_matches(name, known, 1, 0.84)), None)


def refuse_misspelt(function: Callable, given: Iterable[str], more: tuple[str, ...] = ()) -> None:
    """
    Raises a TypeError for a name in `given`, the `**kwargs` of `function`, that comes close to an argument of its own
    (or to one of `more`) but is none. Other names go through: libraries hand theirs on to each other.
    """
    if is_torchdynamo_compiling():
        return
    for name in given:
        if (meant := _meant(function, name, more)) is not None:
            raise TypeError(f"{function.__qualname__} has no argument {name!r}: did you mean {meant!r}?")


def check_images(image_BT: torch.Tensor, num_images: int, seq_length: int) -> None:
    """
    Whether rows have room for exactly `num_images` images, each whole within one row.

    Args:
        image_BT (`(B, T)`): where `<image>` stands. seq_length: positions an image.

    Raises:
        ValueError: naming what the rows hold.
    """
    positions_B = image_BT.sum(1)
    fits = (positions_B % seq_length == 0).all() & (positions_B.sum() == num_images * seq_length)

    def message() -> str:
        return (
            f"{num_images} image(s) of {seq_length} <image> positions each do not fit the rows, which hold "
            f"{positions_B.tolist()}: pass every image of the batch in pixel_values, and prompts made by "
            "AlignGPTProcessor (or not cut by max_length)."
        )

    require(fits, message, "the <image> positions of a row do not fit the images in pixel_values")


def check_levels(levels: torch.Tensor, num_levels: int) -> None:
    """Raises a ValueError for a level outside 0..`num_levels` - 1."""
    in_range = ((levels >= 0) & (levels < num_levels)).all()
    message = f"is out of range: levels are 0..{num_levels - 1}, 0-based."
    require(in_range, lambda: f"align_level={levels.tolist()} {message}", f"align_level {message}")


def _can_look(values: torch.Tensor) -> bool:
    return not is_torchdynamo_compiling() and values.device.type not in (*ASYNC_DEVICES, "meta")


def warn_without_images(image_BT: torch.Tensor) -> None:
    """
    Warns once when prompts hold `<image>` but no image came, if checking is free. Not an error: in assisted decoding,
    transformers calls the assistant model that way.
    """
    if _can_look(image_BT) and bool(image_BT.any()):
        logger.warning_once(
            "A prompt holds <image> but no pixel_values came: the model sees no image there. Pass all that "
            "AlignGPTProcessor returns, or leave <image> out of prompts without an image."
        )


def warn_without_align(image_BT: torch.Tensor, align_BT: torch.Tensor) -> None:
    """Warns once when a row has an image but no `<align>`, if checking is free."""
    if _can_look(image_BT) and bool((image_BT.any(1) & ~align_BT.any(1)).any()):
        logger.warning_once(
            "A prompt has an image but no <align>: it is answered without an alignment vector, which the model was "
            "not trained for. Prompts made by AlignGPTProcessor have one."
        )


def warn_about_labels(config, input_ids, labels, prompt_mask, align_level) -> None:
    """
    Warns once about rows as other trainers make them, if checking is free: where nothing says where answers begin the
    gate reads them, and labels that are a copy of the ids supervise the placeholders.

    Args:
        config ([`AlignGPTConfig`]): of the model. input_ids, labels, prompt_mask (`(B, T)`), align_level: of `forward`.
    """
    if is_torchdynamo_compiling():
        return
    gates = align_level is None and config.uses_gate
    finds = config.gate_context == "first_turn" and config.answer_openings
    if gates and prompt_mask is None and config.gate_context != "sequence" and not finds:
        logger.warning_once(
            "labels came, and the config does not say how answers begin: the gate reads them, which it does not see "
            'when it is used. Set config.gate_context = "first_turn" and config.answer_openings = '
            "answer_openings(processor.tokenizer, processor.chat_template), from the model's gate_prompt_aligngpt.py."
        )
    if input_ids is None or not _can_look(labels):
        return
    placeholders_BT = (labels == config.image_token_id) | (labels == config.align_token_id)
    if bool(placeholders_BT.any()):
        logger.warning_once(
            "labels supervise <image> and <align>, which are no text: set them to -100 (assistant_only_loss=True in "
            "TRL's SFTConfig)."
        )


def is_prefill(cache: Cache | None, length: int) -> bool:
    """
    Whether `length` positions are the first ones; a single position behind a cache never asks the cache. A paged cache
    (`generate_batch`) has no one length: its positions are of requests of any age.
    """
    if cache is None or not hasattr(cache, "get_seq_length"):
        return True
    return length > 1 and not is_torchdynamo_compiling() and int(cache.get_seq_length()) == 0


__all__ = [
    "check_levels",
    "check_images",
    "is_prefill",
    "refuse_misspelt",
    "require",
    "warn_about_labels",
    "warn_without_align",
    "warn_without_images",
]
