"""
The authors' checkpoint format (github.com/AlignGPT-VL/AlignGPT): parameter names, config fields, weight files.

Read from folders on disk, without the authors' code. Two kinds exist: a finetuned model (`config.json`, tokenizer and
all weights, the vision tower's inside or not), and what stage 1 leaves (`mm_projector_align.bin` with the projector and
the level table, `config.json` beside it).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from aligngpt_shared.files import read_json
from aligngpt_shared.weights import StoredWeights, find_weight_files, read_weights
from modeling_aligngpt.backbones import WRAPPER_PREFIXES
from modeling_aligngpt.configuration_aligngpt import AlignGPTConfig


STAGE1_WEIGHTS = "mm_projector_align.bin"
CONFIG_FILE = "config.json"
ADAPTER_FILE = "adapter_config.json"
# In a converted model: what their format holds and ours does not.
ORIGINAL_FOLDER = "original"
RECORD_FILE = "weights.json"
BUFFERS_FILE = "buffers.safetensors"
# Files of theirs that are kept as they are.
KEPT_FILES = (
    "config.json",
    "generation_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
)

# Their parameter prefixes -> ours. The first match counts, so the longer prefixes stand first.
KEY_PREFIXES = (
    ("mm_projector.0.", "model.multi_modal_projector.linear_1."),
    ("mm_projector.2.", "model.multi_modal_projector.linear_2."),
    ("align_indicators.indicator_embs", "model.align_embeddings.weight"),
    ("gated_weight_layer.mlp.0.", "model.align_gate.linear_1."),
    ("gated_weight_layer.mlp.2.", "model.align_gate.linear_2."),
    ("vision_tower.vision_tower.vision_model.", "model.vision_tower."),
    ("lm_head.", "lm_head."),
    ("model.", "model.language_model."),
)
LEVEL_TABLE = "align_indicators.indicator_embs"
# Stage 2 trains the gate from scratch, so stage 1 has none.
GATE_PREFIX = "gated_weight_layer."
TOWER_PREFIX = "vision_tower.vision_tower.vision_model."
# Constants that older transformers releases stored as buffers; they follow from the config.
_BUFFER = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids)$")

# Fields of their config that describe the image side; all others belong to the language model.
_MULTIMODAL_FIELDS = frozenset(
    {
        "freeze_mm_mlp_adapter",
        "image_aspect_ratio",
        "image_grid_pinpoints",
        "n_indicators",
        "s2_scales",
        "tokenizer_model_max_length",
        "tokenizer_padding_side",
        "tune_mm_mlp_adapter",
        "use_mm_proj",
        "use_s2",
    }
)
# What their code takes where `use_s2` stands alone.
_S2_SCALES = "336,672,1008"
_BOOKKEEPING_FIELDS = frozenset({"_name_or_path", "architectures", "model_type", "torch_dtype", "transformers_version"})


def to_our_key(key: str) -> str:
    """Our parameter name for one of theirs (`mm_projector.0.weight`); a `ValueError` for a name of another format."""
    for theirs, ours in KEY_PREFIXES:
        if key.startswith(theirs):
            return ours + key[len(theirs) :]
    raise ValueError(f"Weight {key!r} has no place in the authors' format.")


def to_original_key(key: str) -> str:
    """Their parameter name for one of ours; a `ValueError` for a name that their format has no place for."""
    for theirs, ours in KEY_PREFIXES:
        if key.startswith(ours):
            return theirs + key[len(ours) :]
    raise ValueError(f"Parameter {key!r} has no place in the authors' format.")


def is_buffer(key: str) -> bool:
    """Whether the key names a stored constant (rotary frequencies, position ids) instead of a weight."""
    return _BUFFER.search(key) is not None


@dataclass
class OriginalCheckpoint:
    """
    An opened checkpoint of the authors.

    Attributes:
        folder: where it lies.
        config: their `config.json` as it stands.
        weights: parameters under their names, left on disk.
        buffers: stored constants under their names; not used, kept for the way back.
        is_stage1: whether these are projector and level table alone, as in `mm_projector_align.bin`.
    """

    folder: Path
    config: dict
    weights: StoredWeights
    buffers: dict[str, torch.Tensor]
    is_stage1: bool

    @property
    def has_tower(self) -> bool:
        return any(key.startswith("vision_tower.") for key in self.weights)


def open_checkpoint(path: str | Path) -> OriginalCheckpoint:
    """
    Open a checkpoint of the authors.

    Args:
        path: a folder, or one file of weights inside one, such as `mm_projector_align.bin`.

    Raises:
        ValueError: no such folder, no `config.json`, no weights, a foreign format, an adapter or a projector alone, an
            option that is not supported.
    """
    path = Path(path)
    folder = path.parent if path.is_file() else path
    if not folder.is_dir():
        raise ValueError(f"Checkpoint {path} does not exist.")
    refuse_adapter(folder)
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"{folder} holds no {CONFIG_FILE}: copy the one that was saved with the weights beside them.")
    config = read_json(folder / CONFIG_FILE)
    check_config(config, folder / CONFIG_FILE)
    lone = sorted(folder.glob("mm_projector*.bin"))
    if path.is_file():
        weights = StoredWeights.of_file(path)
    else:
        weights = StoredWeights.of_file(lone[-1]) if lone and not find_weight_files(folder) else read_weights(folder)
    weights.rename(unwrapped)
    is_stage1 = bool(weights) and all("mm_projector." in key or "indicator_embs" in key for key in weights)
    if is_stage1 and LEVEL_TABLE not in weights:
        raise ValueError(
            f"{path} holds a projector alone, without the level table ({LEVEL_TABLE}): give the {STAGE1_WEIGHTS} that "
            "stage 1 of the authors' code leaves, which has both, or a whole model."
        )
    buffers = {key: weights.read(key).clone() for key in weights if is_buffer(key)}
    weights.drop(buffers)
    weights.close()
    return OriginalCheckpoint(folder, config, weights, buffers, is_stage1)


def refuse_adapter(folder: Path) -> None:
    """Refuses, with a `ValueError` that says how it becomes a model, a folder with an adapter in place of weights."""
    if not (folder / ADAPTER_FILE).is_file():
        return
    path = folder / CONFIG_FILE
    if path.is_file() and "vision_config" in read_json(path):
        raise ValueError(
            f"{folder} holds an adapter, not a whole model: `aligngpt merge --adapter {folder} --output DIR` makes one."
        )
    raise ValueError(
        f"{folder} holds an adapter ({ADAPTER_FILE}), not a whole model: merge it into its base with peft "
        "(`merge_and_unload`), and convert what you save then."
    )


def unwrapped(key: str) -> str:
    """A weight's name without what DDP, `torch.compile` or peft put in front of it."""
    return re.sub(WRAPPER_PREFIXES, "", key)


def check_config(config: dict, source: Path | str) -> None:
    """Refuse, with a `ValueError` naming the field, what is not a config of theirs or asks for what we do not have."""
    model_type = str(config.get("model_type"))
    if "vision_config" in config:
        raise ValueError(f"{source} is no config of the authors' format: it has a vision_config. Already converted?")
    if model_type != "aligngpt" and not model_type.startswith("aligngpt_"):
        raise ValueError(f"{source}: model_type={model_type!r}, expected 'aligngpt' or 'aligngpt_<language model>'.")
    text_type(config)
    supported = {
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_vision_select_feature": ("patch", "cls_patch", None),
        "image_aspect_ratio": ("pad", "square", None),
        "mm_use_im_start_end": (False, None),
        "mm_use_im_patch_token": (False, None),
        "use_s2": (True, False, None),
    }
    for field, values in supported.items():
        if config.get(field) not in values:
            allowed = ", ".join(repr(value) for value in values if value is not None)
            raise ValueError(f"{source}: {field}={config.get(field)!r} is not supported, only {allowed}.")


def text_type(config: dict) -> str:
    """transformers' `model_type` of the language model inside: `aligngpt` is Llama, `aligngpt_phi` Phi, and so on."""
    name = str(config["model_type"]).removeprefix("aligngpt").lstrip("_") or "llama"
    if name not in CONFIG_MAPPING:
        raise ValueError(f"model_type={config['model_type']!r}: transformers knows no language model {name!r}.")
    return name


def text_config(config: dict) -> PretrainedConfig:
    """The language model's config out of theirs."""
    foreign = _MULTIMODAL_FIELDS | _BOOKKEEPING_FIELDS
    fields = {key: value for key, value in config.items() if key not in foreign and not key.startswith("mm_")}
    if fields.get("rope_scaling") is None:
        fields.pop("rope_scaling", None)
    name = text_type(config)
    try:
        return AutoConfig.for_model(name, **fields)
    except Exception as error:  # whatever a damaged value does in a family's own code
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"config.json: no {name} can be made of it ({type(error).__name__}: {reason}).") from error


def check_depth(config: dict, weights: Iterable[str], field: str, pattern: str) -> None:
    """
    Compares a number of layers with the weights that are there, before anything of that depth is built.

    Raises:
        ValueError: naming both.
    """
    found = {int(match[1]) for key in weights if (match := re.search(pattern, key))}
    if not found:
        raise ValueError(f"The weights hold no layer of the language model: {_listed(sorted(weights), 3)}.")
    told = config.get(field)
    if not isinstance(told, int) or isinstance(told, bool) or told != len(found):
        raise ValueError(f"config.json: {field} is {told!r}, but the weights are those of {len(found)} layers.")


def vision_scales(config: dict, image_size: int) -> list[int] | None:
    """
    Their S2 sizes (`use_s2`, `s2_scales`: pixels as "336,672,1008") as multiples of the tower's `image_size`.

    Raises:
        ValueError: sizes that do not begin with the tower's, or are no multiples of it.
    """
    if not config.get("use_s2"):
        return None
    given = config.get("s2_scales", _S2_SCALES)
    sizes = sorted(int(size) for size in (given.split(",") if isinstance(given, str) else given))
    if not sizes or sizes[0] != image_size or any(size % image_size for size in sizes):
        raise ValueError(
            f"s2_scales={given!r}: the smallest must be the tower's image_size {image_size}, others whole "
            "multiples of it. Name the tower that belongs to this checkpoint."
        )
    return [size // image_size for size in sizes]


def vision_config(tower: Path) -> PretrainedConfig:
    """The vision part's config of a tower folder (`CLIPVisionModel`, or the whole `CLIPModel` / `SiglipModel`)."""
    config = AutoConfig.from_pretrained(tower)
    return getattr(config, "vision_config", config)


def tower_weights(tower: Path) -> StoredWeights:
    """The vision part's weights of a tower folder, under their names inside a full checkpoint."""
    marker, stored, found = "vision_model.", read_weights(tower), StoredWeights()
    for key in stored:
        if key.startswith(marker) and not is_buffer(key):
            found.take(stored, key, TOWER_PREFIX + key.split(marker, 1)[1])
    if not found:
        raise ValueError(f"Vision tower {tower} holds no weights named {marker}*.")
    return found


def original_fields(config: AlignGPTConfig, do_pad: bool, tower_name: str, max_length: int, vocab_size: int) -> dict:
    """Their `config.json` for a model of ours that was not converted from theirs."""
    text = config.text_config
    suffix = "" if text.model_type == "llama" else f"_{text.model_type}"
    fields = {key: value for key, value in text.to_dict().items() if key not in ("rope_parameters", "dtype")}
    rope = dict(getattr(text, "rope_parameters", None) or {})
    theta = rope.pop("rope_theta", getattr(text, "rope_theta", 10000.0))
    is_default_rope = rope.get("rope_type", "default") == "default"
    class_name = "AlignGPT" + text.model_type.capitalize() * bool(suffix)
    fields.update(
        vocab_size=vocab_size,
        rope_theta=theta,
        rope_scaling=None if is_default_rope else {"type": rope.get("rope_type"), **rope},
        architectures=[f"{class_name}ForCausalLM"],
        model_type=f"aligngpt{suffix}",
        torch_dtype=str(config.dtype or torch.float32).removeprefix("torch."),
        freeze_mm_mlp_adapter=False,
        image_aspect_ratio="pad" if do_pad else "square",
        mm_hidden_size=config.projector_in_features,
        mm_projector_type="mlp2x_gelu",
        mm_use_im_patch_token=False,
        mm_use_im_start_end=False,
        mm_vision_select_feature="patch" if config.vision_feature_select_strategy == "default" else "cls_patch",
        mm_vision_select_layer=config.vision_feature_layer,
        mm_vision_tower=tower_name,
        tokenizer_model_max_length=max_length,
        tokenizer_padding_side="right",
        tune_mm_mlp_adapter=False,
        use_mm_proj=True,
    )
    if config.vision_scales is not None:
        sizes = (config.vision_config.image_size * scale for scale in config.vision_scales)
        fields.update(use_s2=True, s2_scales=",".join(map(str, sizes)))
    return fields


def check_weights(weights: StoredWeights, shapes: dict[str, torch.Size], optional: frozenset[str]) -> None:
    """
    Compare a checkpoint's weights with what the model has; refuse it when they differ.

    Args:
        weights: under their names.
        shapes: expected shapes under their names.
        optional: names that may be absent.

    Raises:
        ValueError: naming every missing, surplus or misshapen weight.
    """
    missing = sorted(shapes.keys() - weights.keys() - optional)
    surplus = sorted(weights.keys() - shapes.keys())
    misshapen = [
        f"{key} {list(weights[key].shape)} instead of {list(shapes[key])}"
        for key in sorted(weights.keys() & shapes.keys())
        if weights[key].shape != shapes[key]
    ]
    not_float = sorted(key for key in weights.keys() & shapes.keys() if not weights[key].is_floating_point())
    kinds = (("missing", missing), ("surplus", surplus), ("of another shape", misshapen), ("not floating", not_float))
    problems = [f"{kind}: {_listed(names)}" for kind, names in kinds if names]
    if problems:
        raise ValueError(
            "The weights do not fit the config. Weights " + "; ".join(problems) + ". "
            "Check that config, language model and vision tower belong to this checkpoint."
        )
    if broken := weights.not_finite():
        raise ValueError(
            f"{len(broken)} weights hold NaN or infinity: {_listed(broken)}. Download the checkpoint again."
        )


def _listed(names: list[str], limit: int = 12) -> str:
    """Names for a message, with a count for the rest."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
