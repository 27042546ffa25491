"""A fresh AlignGPT from a language model and a vision tower: placeholder tokens, vocabulary, templates, processor."""

import copy
import math
import os
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.configuration_utils import PretrainedConfig
from transformers.tokenization_utils_base import AddedToken, PreTrainedTokenizerBase
from transformers.utils import logging

from .backbones import WRAPPER_PREFIXES, backbone_of, check_language_model, check_vision_tower, read_config
from .base_aligngpt import complete_generation_config
from .chat_templates import CHAT_TEMPLATES, select_chat_template, stop_token
from .configuration_aligngpt import AlignGPTConfig, answer_openings
from .images_aligngpt import output_size
from .modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTMLP
from .new_processor import image_settings, processor_from_parts
from .processing_aligngpt import AlignGPTProcessor


logger = logging.get_logger(__name__)

IMAGE_TOKEN, ALIGN_TOKEN = "<image>", "<align>"
VOCABULARY_MULTIPLE = 64
# a tower's summary of an image, by the families' names: what is projected is a layer's states
_POOLERS = ("pooler.", "head.")


def add_placeholder_tokens(tokenizer) -> tuple[int, int]:
    """Adds `<image>` and `<align>` as special tokens (where missing) and returns their ids; gives a pad token."""
    placeholders = [AddedToken(token, special=True, normalized=False) for token in (IMAGE_TOKEN, ALIGN_TOKEN)]
    tokenizer.add_tokens(placeholders, special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), tokenizer.convert_tokens_to_ids(ALIGN_TOKEN)


def padded_vocabulary_size(num_tokens: int) -> int:
    """`num_tokens` rounded up to the multiple that the embedding and head are padded to."""
    return math.ceil(num_tokens / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def extend_rows(weight: torch.Tensor, num_rows: int, align_token_id: int | None = None) -> torch.Tensor:
    """
    `weight` (`(V, D)` or `(V,)`) with rows appended at the mean of the old ones.

    In an input embedding the row of `<align>` (named by `align_token_id`) is off the mean by 2^-6 of it, so that the
    two placeholders can be told apart where only `inputs_embeds` are given.
    """
    if num_rows <= weight.shape[0]:
        return weight
    mean = weight.float().mean(0, keepdim=True)
    rows = mean.expand(num_rows - weight.shape[0], *weight.shape[1:]).clone()
    if align_token_id is not None and align_token_id >= weight.shape[0]:
        rows[align_token_id - weight.shape[0]] *= 1 + 2**-6
    return torch.cat([weight, rows.to(weight.dtype)])


def extend_vocabulary(language_model, num_tokens: int, align_token_id: int) -> None:
    """Pads embedding and head of a causal language model to hold `num_tokens`, see [`extend_rows`]; in place."""
    embedding, head = language_model.get_input_embeddings(), language_model.get_output_embeddings()
    size = max(padded_vocabulary_size(num_tokens), embedding.num_embeddings)
    tied = head.weight is embedding.weight
    with torch.no_grad():
        embedding.weight = nn.Parameter(extend_rows(embedding.weight.detach(), size, align_token_id))
        embedding.num_embeddings = size
        head.weight = embedding.weight if tied else nn.Parameter(extend_rows(head.weight.detach(), size))
        if head.bias is not None:
            head.bias = nn.Parameter(extend_rows(head.bias.detach(), size))
        head.out_features = size
    language_model.config.get_text_config().vocab_size = size


def placeholder_generation_config(
    generation_config, config: AlignGPTConfig, tokenizer, chat_template: str | None = None
) -> GenerationConfig:
    """
    `generation_config` with the placeholders and the padded rows of the vocabulary suppressed, so that no answer holds
    a token without a text; and stopping where an answer of the template named `chat_template` stops. A `max_length` is
    left out: it was meant for text, and would count an image's tokens.
    """
    generation_config = GenerationConfig.from_dict(generation_config.to_dict())
    padded = range(len(tokenizer), config.text_config.vocab_size)
    generation_config.suppress_tokens = sorted({config.image_token_id, config.align_token_id, *padded})
    generation_config.max_length = GenerationConfig().max_length
    if generation_config.pad_token_id is None or generation_config.pad_token_id < 0:
        generation_config.pad_token_id = tokenizer.pad_token_id
    if chat_template is not None:
        own = generation_config.eos_token_id
        stops = [] if own is None else own if isinstance(own, list) else [own]
        stop = tokenizer.convert_tokens_to_ids(stop_token(chat_template, tokenizer))
        generation_config.eos_token_id = stops[0] if stops == [stop] else list(dict.fromkeys([*stops, stop]))
    return complete_generation_config(generation_config)


def load_language_model(language_model: str | os.PathLike, dtype=None):
    """
    A causal language model; what a wrapper put in front of its weights' names is passed over.

    Raises:
        ValueError: the checkpoint lacks weights of the model, which would stay random.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        language_model, dtype=dtype, key_mapping={WRAPPER_PREFIXES: ""}, output_loading_info=True
    )
    model, report = loaded
    # buffers follow from the config, and of tied weights one name is enough
    if missing := sorted(report["missing_keys"] & {name for name, _ in model.named_parameters()}):
        raise ValueError(
            f"{language_model} lacks {len(missing)} weights of a {model.config.model_type} ({', '.join(missing[:3])}), "
            "which would stay random: name a whole causal language model."
        )
    return model


def load_vision_tower(vision_tower: str | os.PathLike, dtype=None, image_size: int | None = None):
    """
    The vision part of a dual encoder (CLIP, SigLIP, a `VisionTextDualEncoderModel`), or a vision tower as it is.

    Args:
        vision_tower: folder or Hub id.
        dtype: of the weights.
        image_size: of the images that it shall take, see [`interpolated`]; `None`: its config's.

    Returns:
        The model. Weights of its pooler, which nothing here reads, are zeros where the checkpoint has none.

    Raises:
        ValueError: the checkpoint lacks other weights of the tower, which would stay random.
    """
    config = read_config(vision_tower, "vision tower")
    # there a model of any family stands behind a prefix that its own class does not know
    prefix = {r"^vision_model\.": ""} if config.model_type == "vision-text-dual-encoder" else None
    tower, report = AutoModel.from_pretrained(
        vision_tower, config=vision_config_of(config), dtype=dtype, key_mapping=prefix, output_loading_info=True
    )
    lacking = sorted(report["missing_keys"])
    if missing := [name for name in lacking if not name.removeprefix("vision_model.").startswith(_POOLERS)]:
        raise ValueError(
            f"{vision_tower} lacks {len(missing)} weights of a {tower.config.model_type} ({', '.join(missing[:3])}): "
            "name a vision tower, or a CLIP or SigLIP model."
        )
    with torch.no_grad():
        for name in lacking:
            tower.get_parameter(name).zero_()
    return tower if image_size in (None, tower.config.image_size) else _resized(tower, image_size)


def _resized(tower, image_size: int):
    """The tower for images of another size."""
    config = with_image_size(tower.config, image_size)
    with torch.random.fork_rng(devices=[]):
        resized = AutoModel.from_config(config, dtype=tower.dtype)
    shapes = {name: value.shape for name, value in resized.state_dict().items()}
    weights = tower.state_dict()
    for name, value in weights.items():
        if value.shape != shapes[name]:
            weights[name] = interpolated(value, tower.config, image_size)
    resized.load_state_dict(weights)
    return resized.eval()


def with_image_size(vision_config: PretrainedConfig, image_size: int) -> PretrainedConfig:
    """
    A copy of a tower's config for images of another size.

    Raises:
        ValueError: the tower's config has no size in pixels, or its patches do not fill such an image.
    """
    own, patch = (getattr(vision_config, name, None) for name in ("image_size", "patch_size"))
    if not isinstance(own, int) or not isinstance(patch, int):
        raise ValueError(f"image_size={image_size}: the config of this {vision_config.model_type} has none to change.")
    if image_size != own and (image_size < patch or image_size % patch):
        near = max(patch, image_size // patch * patch)
        raise ValueError(
            f"image_size={image_size} is no multiple of the tower's patch_size {patch}: take {near} or {near + patch}."
        )
    vision_config = copy.deepcopy(vision_config)
    vision_config.image_size = image_size
    return vision_config


def interpolated(positions: torch.Tensor, vision_config: PretrainedConfig, image_size: int) -> torch.Tensor:
    """
    A tower's position embeddings `(..., P + S * S, V)`, of P special tokens and S patches a side, for images of another
    size, as the family's own class interpolates them.

    Args:
        positions: of images of `vision_config.image_size` pixels.
        vision_config: the tower's.
        image_size: in pixels.
    """
    old, new = (size // vision_config.patch_size for size in (vision_config.image_size, image_size))
    special, grid = positions.float().split([positions.shape[-2] - old**2, old**2], dim=-2)
    grid = nn.functional.interpolate(
        grid.reshape(1, old, old, -1).permute(0, 3, 1, 2),
        size=(new, new),
        mode="bicubic",
        antialias=vision_config.model_type == "dinov2_with_registers",
    )
    grid = grid.flatten(2).transpose(1, 2).reshape(*special.shape[:-2], new**2, -1)
    return torch.cat([special, grid], dim=-2).to(positions.dtype)


def vision_config_of(config: PretrainedConfig) -> PretrainedConfig:
    """The vision part of a dual encoder's config, or the config as it is."""
    return getattr(config, "vision_config", config)


def plan(
    language_model: str | os.PathLike,
    vision_tower: str | os.PathLike,
    *,
    language_model_revision: str | None = None,
    vision_tower_revision: str | None = None,
    chat_template: str | None = None,
    image_size: int | None = None,
    **config_overrides,
) -> tuple[AlignGPTConfig, PreTrainedTokenizerBase, str]:
    """
    What [`assemble`] would make of two checkpoints, from their configs and tokenizer alone; both are tried on small
    copies (see `backbones.py`).

    Returns:
        Config, tokenizer with the placeholders, and name of the chat template.

    Raises:
        ValueError: a part does not fit, nothing says how the tower's images are scaled, or `chat_template` is unknown.
    """
    lm_config = read_config(language_model, "language model", language_model_revision)
    vision_config = vision_config_of(read_config(vision_tower, "vision tower", vision_tower_revision))
    settings = image_settings(vision_tower, vision_tower_revision)
    if image_size is not None:
        vision_config = with_image_size(vision_config, image_size)
    check_language_model(lm_config, language_model)
    tokenizer = AutoTokenizer.from_pretrained(language_model, revision=language_model_revision)
    name = chat_template or select_chat_template(tokenizer)
    if name not in CHAT_TEMPLATES:
        raise ValueError(f"chat_template={name!r} is not one of {', '.join(CHAT_TEMPLATES)}.")
    with torch.device("meta"):
        head = AutoModelForCausalLM.from_config(lm_config).get_output_embeddings()
    placeholder_ids = add_placeholder_tokens(tokenizer)
    text_config = lm_config.get_text_config()
    text_config.vocab_size = max(padded_vocabulary_size(len(tokenizer)), text_config.vocab_size)
    overrides = {"answer_openings": answer_openings(tokenizer, CHAT_TEMPLATES[name]), **config_overrides}
    config = _make_config(text_config, vision_config, placeholder_ids, head.bias is not None, overrides)
    check_vision_tower(config, vision_tower)
    if image_size is None:
        _compare_sizes(config, settings, vision_tower)
    return config, tokenizer, name


def _compare_sizes(config: AlignGPTConfig, settings: dict, vision_tower: str | os.PathLike) -> None:
    """Says when a tower's config and its image processor name different sizes."""
    own, given = getattr(config.vision_config, "image_size", None), output_size(SimpleNamespace(**settings))
    if not isinstance(own, int) or given is None or given[0] != given[1] or given[0] == own:
        return
    logger.warning_once(
        f"vision tower {str(vision_tower)!r}: its config says images of {own} pixels, which is what the model takes "
        f"({config.image_seq_length:,} tokens an image); its image processor makes {given[0]}. For those: "
        f"`aligngpt init --image-size {given[0]}`."
    )


def _make_config(text_config, vision_config, placeholder_ids, lm_head_bias: bool, overrides: dict) -> AlignGPTConfig:
    return AlignGPTConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=placeholder_ids[0],
        align_token_id=placeholder_ids[1],
        lm_head_bias=lm_head_bias,
        **{"align_mode": "level", **overrides},
    )


def assemble(
    language_model: str | os.PathLike,
    vision_tower: str | os.PathLike,
    *,
    chat_template: str | None = None,
    image_size: int | None = None,
    do_pad: bool = False,
    dtype: torch.dtype | str | None = None,
    seed: int = 0,
    **config_overrides,
) -> tuple[AlignGPTForConditionalGeneration, AlignGPTProcessor]:
    """
    Assembles an untrained AlignGPT from two checkpoints.

    Args:
        language_model: folder or Hub id of a causal language model, tokenizer included.
        vision_tower: folder or Hub id of a vision tower or of a dual encoder (CLIP, SigLIP).
        chat_template: a name of `CHAT_TEMPLATES`; `None` recognises the language model's own.
        image_size: pixels of an image's side, a multiple of the tower's patches, in place of its config's.
        do_pad: images padded to a square with the mean colour (`True`: stage 2) or cropped (`False`: stage 1).
        dtype: of the weights; `None` is float32.
        seed: of projector, level table and gate, so that every process starts from the same ones.
        config_overrides: fields of [`AlignGPTConfig`].

    Returns:
        Model and processor.

    Raises:
        ValueError: a part does not fit (before any weight is read) or lacks weights, or `chat_template` is unknown.
    """
    planned, tokenizer, template = plan(
        language_model, vision_tower, chat_template=chat_template, image_size=image_size, **config_overrides
    )
    dtype = torch.float32 if dtype is None else dtype
    causal_lm = load_language_model(language_model, dtype)
    extend_vocabulary(causal_lm, len(tokenizer), planned.align_token_id)
    tower = load_vision_tower(vision_tower, dtype, image_size)
    placeholder_ids = planned.image_token_id, planned.align_token_id
    text_config = causal_lm.config.get_text_config()
    overrides = {"answer_openings": planned.answer_openings, **config_overrides}
    config = _make_config(text_config, tower.config, placeholder_ids, planned.lm_head_bias, overrides)
    model = _from_parts(config, causal_lm, tower, seed)
    model.generation_config = placeholder_generation_config(causal_lm.generation_config, config, tokenizer, template)
    processor = processor_from_parts(
        tokenizer, config, vision_tower=vision_tower, chat_template=CHAT_TEMPLATES[template], do_pad=do_pad
    )
    return model, processor


def _from_parts(config: AlignGPTConfig, causal_lm, tower, seed: int) -> AlignGPTForConditionalGeneration:
    """Puts loaded parts into an AlignGPT made on the meta device: no second copy of the weights exists."""
    with torch.device("meta"):
        model = AlignGPTForConditionalGeneration(config)
    model.model.language_model = backbone_of(causal_lm)
    model.lm_head = causal_lm.get_output_embeddings()
    model.model.vision_tower = getattr(tower, "vision_model", tower)
    for name, part in fresh_parts(config, seed).items():
        setattr(model.model, name, part)
    model.to(model.get_input_embeddings().weight.dtype)  # type: ignore[arg-type]
    model.tie_weights()
    return model.eval()


def fresh_parts(config: AlignGPTConfig, seed: int) -> dict[str, nn.Module]:
    """
    Untrained projector, gate and level table, by the names they have in [`AlignGPTModel`]. The table starts as the
    authors' does: uniform, within the square root of 6 / (N + D).

    Args:
        seed: of all three.
    """
    hidden_size, act = config.text_config.hidden_size, config.projector_hidden_act
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts: dict[str, nn.Module] = {
            "multi_modal_projector": AlignGPTMLP(config.projector_in_features, hidden_size, hidden_size, act),
            "align_gate": AlignGPTMLP(
                config.image_seq_length, config.gate_hidden_size, config.num_align_levels - 1, act
            ),
            "align_embeddings": (table := nn.Embedding(config.num_align_levels, hidden_size)),
        }
        nn.init.xavier_uniform_(table.weight)
    return parts


__all__ = [
    "add_placeholder_tokens",
    "assemble",
    "extend_rows",
    "extend_vocabulary",
    "fresh_parts",
    "load_language_model",
    "interpolated",
    "load_vision_tower",
    "padded_vocabulary_size",
    "placeholder_generation_config",
    "plan",
    "vision_config_of",
    "with_image_size",
]
