"""
Whether a language model and a vision tower can be parts of an AlignGPT, tried on small copies of their configs.

A language model's own class may do more than multiply by its head (scale or cap logits, add embeddings by id), and a
tower may put more in front of its patches than a class token. What this code does is compared with what the family's
own class does, on a copy with few layers, the real widths and all its factors, before weights are read.
"""

import copy
import os
from contextlib import contextmanager

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.configuration_utils import PretrainedConfig

from .base_aligngpt import CACHE_NAME
from .configuration_aligngpt import AlignGPTConfig
from .modeling_aligngpt import AlignGPTForConditionalGeneration


# what DDP, `torch.compile` and peft put in front of the names of a model's weights
WRAPPER_PREFIXES = r"^(?:module\.|_orig_mod\.|base_model\.model\.)+"
# widths that change nothing but the size of a copy
FREE_WIDTHS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_dim", "n_inner")
SMALL_WIDTH, SMALL_VOCABULARY = 64, 128
# largest relative difference of logits that are the same
TOLERANCE = 1e-4
_TINY_TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "image_size": 8,
    "patch_size": 4,
}
_TINY_TEXT = {
    "model_type": "llama",
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class BackboneError(ValueError):
    """A language model or vision tower that cannot be a part of an AlignGPT; says which and why."""


def read_config(source: str | os.PathLike, role: str, revision: str | None = None) -> PretrainedConfig:
    """
    The config of a language model or vision tower.

    Raises:
        BackboneError: there is none, its family is unknown to the installed transformers, or it is a timm model's.
    """
    try:
        values, _ = PretrainedConfig.get_config_dict(source, revision=revision)
        if "pretrained_cfg" not in values:
            return AutoConfig.from_pretrained(source, revision=revision)
    except Exception as error:
        first = str(error).strip().splitlines()[0]
        raise BackboneError(
            f"{role} {str(source)!r}: its config cannot be read by transformers {transformers.__version__} ({first})."
        ) from error
    raise BackboneError(
        f"{role} {str(source)!r} is a timm model ({values.get('architecture')}): its config names neither width nor "
        "patches nor layers, and whoever loads it needs timm and torchvision. Take the same encoder in transformers' "
        "own format: ViT, SigLIP and DINOv2 have one."
    )


def backbone_of(causal_lm: nn.Module) -> nn.Module:
    """A causal language model without its head."""
    # where the prefix names what only the multimodal form has (Llama 4), `base_model` is the model itself
    return causal_lm.model if causal_lm.base_model is causal_lm else causal_lm.base_model  # type: ignore[return-value]


def few_layers(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of a language model's config with two layers, or one of each kind, and a small vocabulary."""
    small = copy.deepcopy(config)
    count = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    kept = list({kind: index for index, kind in reversed(list(enumerate(kinds)))}.values())[::-1]
    kept = sorted({*kept, 0, 1} if len(kept) < 2 else kept)
    for name, value in vars(config).items():
        # one entry a layer: what the kept layers have
        if isinstance(value, (list, tuple)) and len(value) == count > 2:
            setattr(small, name, [value[index] for index in kept])
    small.num_hidden_layers = min(len(kept), count)
    for name in FREE_WIDTHS:
        if isinstance(width := getattr(config, name, None), int) and width > SMALL_WIDTH:
            setattr(small, name, SMALL_WIDTH)
    small.vocab_size = min(config.vocab_size, SMALL_VOCABULARY)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        token = getattr(config, name, None)
        tokens = token if isinstance(token, list) else [token]
        if any(isinstance(one, int) and one >= small.vocab_size for one in tokens):
            setattr(small, name, None)
    return small


def check_language_model(config: PretrainedConfig, source: str | os.PathLike) -> None:
    """
    Tries a language model: its logits, whole and with a cache, must be those of its own class.

    Args:
        config: of the language model, as `AutoConfig` gives it.
        source: its name, for messages.

    Raises:
        BackboneError: naming the family and what does not fit.
    """
    text_config = config.get_text_config()
    with _refusing(f"language model {str(source)!r} ({text_config.model_type})"):
        small = few_layers(text_config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            _compare(small)


def _compare(small: PretrainedConfig) -> None:
    own = AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval()
    head = own.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise BackboneError(f"its head is {type(head).__name__}, not nn.Linear")
    size = small.vocab_size
    config = AlignGPTConfig(
        vision_config=dict(_TINY_TOWER),
        text_config=small,
        image_token_id=size - 1,
        align_token_id=size - 2,
        align_mode="level",
        lm_head_bias=head.bias is not None,
    )
    ours = AlignGPTForConditionalGeneration(config).eval()
    ours.model.language_model.load_state_dict(backbone_of(own).state_dict())
    ours.lm_head.load_state_dict(head.state_dict())
    ids = torch.randint(3, size - 2, (2, 7))
    with torch.no_grad():
        expected, logits = own(input_ids=ids).logits, ours(input_ids=ids).logits
        if expected.shape != logits.shape:
            raise BackboneError(f"its logits have the shape {tuple(expected.shape)}, not {tuple(logits.shape)}")
        if (difference := _relative(expected, logits)) > TOLERANCE:
            ratio = float(logits.norm() / expected.norm().clamp(min=1e-12))
            raise BackboneError(
                f"its own class computes other logits (relative difference {difference:.2g}, ours have {ratio:.3g} of "
                "their size): it does something with its logits or inputs that this model does not"
            )
        first = ours(input_ids=ids[:, :-1], use_cache=True)
        last = ours(input_ids=ids[:, -1:], cache=first[CACHE_NAME], use_cache=True).logits
    if (difference := _relative(expected[:, -1:], last)) > 10 * TOLERANCE:
        raise BackboneError(f"logits with a cache differ from those without (relative difference {difference:.2g})")


def _relative(expected: torch.Tensor, given: torch.Tensor) -> float:
    return float((expected - given).abs().max() / expected.abs().max().clamp(min=1e-12))


def check_vision_tower(config: AlignGPTConfig, source: str | os.PathLike) -> None:
    """
    Tries a vision tower: an image must come out as `image_seq_length` tokens of the width that the projector takes.

    Args:
        config: of the whole model.
        source: name of the tower, for messages.

    Raises:
        BackboneError: naming the family and what does not fit.
    """
    with _refusing(f"vision tower {str(source)!r} ({config.vision_config.model_type})"):
        small, vision = copy.deepcopy(config), copy.deepcopy(config.vision_config)
        layer = config.vision_feature_layer
        depth = vision.num_hidden_layers
        if not -depth - 1 <= layer <= depth:
            raise BackboneError(f"vision_feature_layer={layer} is not one of its {depth} layers")
        vision.num_hidden_layers = min(depth, max(2, -layer if layer < 0 else layer))
        small.vision_config = vision
        small.text_config = AutoConfig.for_model(**_TINY_TEXT)  # type: ignore[arg-type]
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            model = AlignGPTForConditionalGeneration(small).eval()
            height, width = _pair(config.input_image_size)
            (features,) = model.get_image_features(torch.rand(1, 3, height, width)).pooler_output
        if len(features) != config.image_seq_length:
            raise BackboneError(
                f"an image becomes {len(features)} tokens, not image_seq_length={config.image_seq_length}: there is "
                "something else than one class token in front of its patches"
            )


def _pair(size) -> tuple[int, int]:
    if size is None:
        raise BackboneError("its config has no image_size")
    return (size, size) if isinstance(size, int) else tuple(size)


@contextmanager
def _refusing(what: str):
    """Turns any error of a trial into one line."""
    try:
        yield
    except BackboneError as error:
        reason = str(error)
    except Exception as error:
        lines = [line.strip() for line in str(error).strip().splitlines()] or [""]
        reason = f"it cannot be used here: {type(error).__name__}: {lines[0][:300]}"
    else:
        return
    raise BackboneError(f"{what}: {reason.rstrip('.')}. See docs/backbones.md for what is known to work.") from None


__all__ = [
    "WRAPPER_PREFIXES",
    "BackboneError",
    "backbone_of",
    "check_language_model",
    "check_vision_tower",
    "few_layers",
    "read_config",
]
