"""
What model and `generate` share: the base class (loading in 8 and 4 bits, saving), outputs, the cache's two names,
checks of values that lie in tensors, S2's scales.

Shape suffixes: B rows, T positions, I images of the whole batch, S positions an image, D hidden size, V hidden size of
the tower, N alignment levels, K scales.
"""

import copy
import difflib
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn
from transformers import AutoTokenizer, GenerationConfig
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import is_torchdynamo_compiling, logging

from .configuration_aligngpt import AUTO_MAP, AlignGPTConfig, answer_openings


logger = logging.get_logger(__name__)

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
                kwargs["quantization_config"] = copy.copy(given)
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


_OF_BEAMS = {"early_stopping": False, "length_penalty": 1.0}

# settings that do nothing without `do_sample`, or without beams, with the values at which nobody minds them
_OF_SAMPLING = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}

# most tokens of an answer where nobody says
MAX_NEW_TOKENS = 1024


def complete_generation_config(generation_config: GenerationConfig) -> GenerationConfig:
    """
    A copy that transformers saves and that `generate` needs nothing beside: with a limit of the answer's length, and
    without settings of sampling or beams that are off, which are said and left out (Vicuna 1.5 comes with a
    temperature and no `do_sample`; transformers refuses to save that).
    """
    complete, default = copy.deepcopy(generation_config), GenerationConfig()
    idle = {} if complete.do_sample else dict(_OF_SAMPLING)
    if complete.num_beams in (None, 1):
        idle |= _OF_BEAMS
    found = {name: getattr(complete, name, None) for name in idle}
    found = {name: value for name, value in found.items() if value is not None and value != idle[name]}
    for name in found:
        setattr(complete, name, getattr(default, name, None))
    if found:
        listed = ", ".join(f"{name}={value}" for name, value in found.items())
        logger.warning(
            f"generation_config: {listed} left out: without effect at do_sample={complete.do_sample}, "
            f"num_beams={complete.num_beams}, and not saved by transformers."
        )
    if complete.max_new_tokens is None and complete.max_length in (None, default.max_length):
        complete.max_new_tokens = MAX_NEW_TOKENS
    return complete


# ---- outputs: transformers' own, so that a field that a release renames (the cache, in 5.24) is renamed here too ----


@dataclass
class AlignGPTModelOutputWithPast(BaseModelOutputWithPast):
    """
    Outputs of [`AlignGPTModel`]: those of the language model, and

    Args:
        image_hidden_states (`torch.FloatTensor` of shape `(I, S, D)`, *optional*): projected images.
        align_weights (`torch.FloatTensor` of shape `(B, N)`, *optional*): what each level contributes to the row's
            alignment vector: the gate's shares and 1 for the top level, or one-hot for a level given by hand; zeros
            for a row without an image. `None` behind a cache, where no vector is made.
    """

    image_hidden_states: torch.Tensor | None = None
    align_weights: torch.Tensor | None = None


@dataclass
class AlignGPTCausalLMOutputWithPast(CausalLMOutputWithPast):
    """
    Outputs of [`AlignGPTForConditionalGeneration`]: those of a causal language model (`loss`, `logits`
    `(B, T, vocab_size)`, the cache, `hidden_states` and `attentions` layer by layer), and

    Args:
        image_hidden_states (`torch.FloatTensor` of shape `(I, S, D)`, *optional*): projected images.
        align_weights (`torch.FloatTensor` of shape `(B, N)`, *optional*): see [`AlignGPTModelOutputWithPast`].
    """

    image_hidden_states: torch.Tensor | None = None
    align_weights: torch.Tensor | None = None


# ---- the cache: `past_key_values` up to transformers 5.23, `cache` since ----

# what this transformers calls the cache, as an argument of `forward` and as a field of outputs
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache that came under one of its names; a ValueError if it came under both."""
    if cache is not None and past_key_values is not None:
        raise ValueError("Pass the cache once, as cache or as past_key_values (its name before transformers 5.24).")
    return past_key_values if cache is None else cache


def cache_in(kwargs: dict) -> Cache | None:
    """The cache among keyword arguments of `generate`, under either name."""
    return one_cache(kwargs.get("cache"), kwargs.get("past_key_values"))


# ---- checks ----
# On CUDA values are asserted on the device, because reading them would wait for all work before; elsewhere they raise.
# `generate`, which waits for every token anyway, reads them on any device before it begins.


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
            "answer_openings(processor.tokenizer, processor.chat_template), from the model's configuration_aligngpt.py."
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


def behind_first(places: Sequence[torch.Tensor]) -> torch.Tensor:
    """
    What stands behind the first place where tokens follow each other.

    Args:
        places: for each of the tokens, where it stands in the rows, `(B, T)`.

    Returns:
        `(B, T)`, bool.
    """
    size = len(places)
    # by starts of what has something behind it
    found = torch.ones_like(places[0][:, size:])
    for number, place in enumerate(places):
        found = found & place[:, number : number + found.shape[1]]
    if not found.shape[1]:
        return torch.zeros_like(places[0])
    return torch.nn.functional.pad(found.cumsum(1) > 0, (size, 0), value=False)


# ---- S2: several resolutions through a tower made for one (arXiv 2403.13043; the paper's resolution variant) ----
# The image is resized to each scale and cut into tiles of the tower's own size; the tiles' features are put together
# again, averaged down to the grid of the first scale and joined on channels: more to see, no more positions.


def multiscale_features(
    pixel_values: torch.Tensor,
    scales: Sequence[int],
    tile_size: int,
    features_of: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """
    Args:
        pixel_values (`(I, 3, height, width)`): images at the largest scale, `tile_size * scales[-1]` square.
        scales (K ints): factors of `tile_size`, rising, the first 1.
        tile_size: height and width of the images that the tower was made for.
        features_of: the tower, from `(images, 3, tile_size, tile_size)` to `(images, S, V)`.

    Returns:
        `(I, S, K * V)`.

    Raises:
        ValueError: images of another size.
    """
    largest = tile_size * scales[-1]
    if pixel_values.shape[-2:] != (largest, largest):
        height, width = pixel_values.shape[-2:]
        raise ValueError(
            f"vision_scales={list(scales)} needs images of {largest}x{largest}, got {height}x{width}: set size and "
            "crop_size of the image processor to it."
        )
    features = []
    for scale in scales:
        images = pixel_values
        if scale != scales[-1]:
            size = (tile_size * scale, tile_size * scale)
            images = nn.functional.interpolate(pixel_values.float(), size=size, mode="bicubic").to(pixel_values.dtype)
        grid = _from_tiles(features_of(_to_tiles(images, scale)), scale)
        if scale > 1:
            grid = nn.functional.avg_pool2d(grid.float(), scale).to(grid.dtype)
        features.append(grid.flatten(2).transpose(1, 2))
    return torch.cat(features, dim=-1)


def _to_tiles(images: torch.Tensor, scale: int) -> torch.Tensor:
    """`(I, 3, scale * t, scale * t)` to `(I * scale * scale, 3, t, t)`, row by row of each image."""
    num_images, channels, height, width = images.shape
    tiles = images.reshape(num_images, channels, scale, height // scale, scale, width // scale)
    return tiles.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, height // scale, width // scale)


def _from_tiles(features: torch.Tensor, scale: int) -> torch.Tensor:
    """`(I * scale * scale, S, V)` to the grid of whole images, `(I, V, scale * g, scale * g)` with `g * g = S`."""
    tiles, length, channels = features.shape
    side = round(length**0.5)
    grid = features.reshape(tiles // scale**2, scale, scale, side, side, channels)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, scale * side, scale * side)
