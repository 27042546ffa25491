"""
How much memory a stage's training will take on each device, before it takes any.

Weights, gradients and optimizer states follow from the parameters and are exact. Activations are what autograd saves,
counted by running the language model's own code on fake tensors (shapes and dtypes without storage), so a 7B model is
measured in seconds on a laptop. What the allocator loses to fragmentation and the GPU's own context are not in it.
"""

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AutoModel, PretrainedConfig
from transformers.masking_utils import AttentionMaskInterface
from transformers.utils import logging

from modeling_aligngpt import AlignGPTForConditionalGeneration


logger = logging.get_logger(__name__)

STRATEGIES = ("none", "ddp", "zero2", "zero3", "fsdp2")
# Bytes of optimizer state for each trained parameter, where they do not depend on its dtype.
STATE_BYTES = {"sgd": 0, "adafactor": 0, "adamw_8bit": 2, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2, "lion_8bit": 1}
# How many states of the parameter's own dtype other optimizers keep; 2 (the AdamW family) when not named.
STATES = {"adagrad": 1, "rmsprop": 1, "lion_32bit": 1, "paged_lion_32bit": 1}
STEP_BYTES = 4  # AdamW's step counter, one a parameter tensor
BUCKET_BYTES = 500_000_000  # of DeepSpeed's reduction and gathering
HEAD_TILE = 4096 * 4096  # logits that TRL's head holds at a time
ATTENTIONS = ("flash", "sdpa", "eager")


@dataclass(frozen=True)
class Batch:
    """
    The largest batch of a device.

    Attributes:
        rows: rows.
        length: tokens of each, padding and image tokens included.
        images: images of all rows together.
        supervised: supervised tokens of all rows together; all, when `None`.
    """

    rows: int
    length: int
    images: int = 0
    supervised: int | None = None


@dataclass(frozen=True)
class MemoryEstimate:
    """
    Bytes on each device.

    Attributes:
        weights: parameters and buffers.
        gradients: of trained parameters, once all are there.
        optimizer: its states, with ZeRO the float32 copies too.
        sharing: what several devices need to add up gradients and to gather weights.
        activations: what the forward keeps for the backward; `None` where it could not be counted.
        head: of the language-model head and its loss.
        images: of the vision tower and the projector.
    """

    weights: int
    gradients: int
    optimizer: int
    sharing: int
    activations: int | None
    head: int
    images: int

    @property
    def total(self) -> int:
        """The sum: an upper bound, since activations go while gradients come."""
        return sum(value or 0 for value in asdict(self).values())


def count_parameters(model: nn.Module) -> dict[str, dict[str, int]]:
    """
    For each part of a model (vision tower, projector, ...) its parameters: `trained` and `all`. Tied ones are counted
    once, where they come first.
    """
    counts: dict[str, Counter] = {}
    for name, parameter in model.named_parameters():
        parts = [part for part in name.split(".") if part not in ("base_model", "model", "module")]
        count = counts.setdefault(parts[0], Counter())
        count["all"] += _numel(parameter)
        count["trained"] += _numel(parameter) * parameter.requires_grad
    return {name: {"trained": count["trained"], "all": count["all"]} for name, count in counts.items()}


def _numel(parameter: nn.Parameter) -> int:
    # four-bit weights are packed, two in a byte
    return parameter.numel() * (2 if type(parameter).__name__ == "Params4bit" else 1)


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def optimizer_bytes(model: nn.Module, optimizer: str = "adamw_torch") -> int:
    """Bytes of the states that an optimizer (a name of `optim`) will keep for the model's trained parameters."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if optimizer in STATE_BYTES:
        return STATE_BYTES[optimizer] * sum(parameter.numel() for parameter in trained)
    steps = STEP_BYTES * len(trained) if optimizer in ("adamw_torch", "adamw_torch_fused") else 0
    return STATES.get(optimizer, 2) * sum(map(_size, trained)) + steps


def estimate_memory(
    model: AlignGPTForConditionalGeneration,
    batch: Batch,
    *,
    checkpointing: bool = True,
    autocast: torch.dtype | None = None,
    optimizer: str = "adamw_torch",
    strategy: str = "none",
    num_devices: int = 1,
) -> MemoryEstimate:
    """
    Args:
        model: what trains, as the trainer froze it; on the meta device too, or with adapters.
        batch: the largest batch of a device.
        checkpointing: gradient checkpointing of the language model.
        autocast: dtype of mixed precision, `None` without.
        optimizer: `optim` of the settings.
        strategy: `"none"` (one device), `"ddp"`, `"zero2"`, `"zero3"` or `"fsdp2"`.
        num_devices: over how many it is shared.

    Raises:
        ValueError: for an unknown strategy, or several devices without one.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r} is not one of {', '.join(STRATEGIES)}.")
    if num_devices < 1 or (strategy == "none" and num_devices != 1):
        raise ValueError(f"strategy={strategy!r} does not go with {num_devices} devices.")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    parameters = list(model.parameters())
    weights = sum(map(_size, parameters)) + sum(map(_size, model.buffers()))
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    gradients, states, sharing = sum(map(_size, trained)), optimizer_bytes(model, optimizer), 0
    compute = 4 if autocast is None else autocast.itemsize
    numel = sum(parameter.numel() for parameter in trained)
    if strategy == "ddp":
        sharing = gradients * (num_devices > 1)  # buckets, beside the gradients themselves
    elif strategy in ("zero2", "zero3"):
        # the engine casts all weights, and keeps float32 copies of what trains with the states
        weights = sum(parameter.numel() * min(compute, parameter.element_size()) for parameter in parameters)
        gradients, states = compute * numel // num_devices, (states + 4 * numel) // num_devices
        sharing = min(2 * BUCKET_BYTES, 2 * compute * numel)
    if strategy in ("zero3", "fsdp2"):
        sharing += 2 * compute * _largest_group(base)
        weights //= num_devices
    if strategy == "fsdp2":
        gradients, states = gradients // num_devices, states // num_devices
    text = base.config.get_text_config()
    language_model = base.model.language_model
    saved = activation_bytes(
        text,
        batch,
        trains=any(parameter.requires_grad for parameter in language_model.parameters()),
        dtype=_main_dtype(language_model),
        autocast=autocast,
        checkpointing=checkpointing,
        attention=_attention_kind(text),
    )
    supervised = batch.rows * batch.length if batch.supervised is None else batch.supervised
    head = 2 * 4 * min(supervised * text.vocab_size, HEAD_TILE) + 2 * compute * supervised * text.hidden_size
    images = _image_bytes(base, batch.images, compute)
    return MemoryEstimate(weights, gradients, states, sharing, saved, head, images)


def activation_bytes(
    config: PretrainedConfig,
    batch: Batch,
    *,
    trains: bool,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    checkpointing: bool = False,
    attention: str = "flash",
) -> int | None:
    """
    What autograd saves of a language model's forward, the parameters themselves left out.

    Args:
        config: of the language model.
        batch: its shape.
        trains: whether its parameters (or adapters in it) train; a frozen one saves less.
        dtype: of its weights.
        autocast: of mixed precision, `None` without.
        checkpointing: keep each layer's input, and compute one layer at a time anew.
        attention: `"flash"`, `"sdpa"` (keeps a mask, as batches with padding need one) or `"eager"`.

    Returns:
        Bytes, or `None` where the model's code cannot run on fake tensors.
    """
    try:
        text = config.to_json_string(use_diff=False)
        total = _saved_bytes(text, type(config), batch, trains, dtype, autocast, attention)
    except Exception as error:  # an architecture whose code looks at values
        logger.warning(f"Activations of {config.model_type} could not be counted ({type(error).__name__}: {error}).")
        return None
    if not checkpointing:
        return total
    inputs = batch.rows * batch.length * config.hidden_size * dtype.itemsize
    return inputs * config.num_hidden_layers + math.ceil(total / config.num_hidden_layers)


class _SavedAttention(torch.autograd.Function):
    """What an attention keeps: query, key, value, result, one number a query; and by kind a mask or all weights."""

    @staticmethod
    def forward(ctx, query, key, value, kind):
        rows, heads, length, _ = query.shape
        # laid out as fused kernels do, so that joining the heads copies nothing
        result = query.new_empty(rows, length, heads, value.shape[-1]).transpose(1, 2)
        kept = [query, key, value, result, query.new_empty(query.shape[:-1], dtype=torch.float32)]
        if kind == "sdpa":  # padding makes a mask, which each layer turns into numbers to add
            kept.append(query.new_empty(rows, 1, length, length))
        elif kind == "eager":
            kept += [query.new_empty(rows, heads, length, length, dtype=torch.float32)]
            kept += [query.new_empty(rows, heads, length, length)]
        ctx.save_for_backward(*kept)
        return result

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError("only the forward is counted")


def _attention(kind, module, query, key, value, attention_mask, **kwargs):
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (query, key, value))
    return _SavedAttention.apply(query, key, value, kind).transpose(1, 2).contiguous(), None


def _attention_name(kind: str) -> str:
    # transformers looks for words such as "flash" in names
    return f"aligngpt_memory_{ATTENTIONS.index(kind)}"


for _kind in ATTENTIONS:
    AttentionInterface.register(_attention_name(_kind), partial(_attention, _kind))
    AttentionMaskInterface.register(_attention_name(_kind), lambda *args, **kwargs: None)


@lru_cache(maxsize=8)
def _saved_bytes(
    config_json: str,
    kind: type,
    batch: Batch,
    trains: bool,
    dtype: torch.dtype,
    autocast: torch.dtype | None,
    attention: str,
) -> int:
    config = kind.from_dict(json.loads(config_json))
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with FakeTensorMode():
        model = AutoModel.from_config(config, attn_implementation=_attention_name(attention), dtype=dtype)
        model.requires_grad_(trains).train()
        own = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
        embeds = torch.empty(batch.rows, batch.length, config.hidden_size, dtype=dtype, requires_grad=True)
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None),
        ):
            model(inputs_embeds=embeds, use_cache=False)
        return sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in own)


def _attention_kind(config: PretrainedConfig) -> str:
    name = config._attn_implementation or "sdpa"
    return name if name in ATTENTIONS else "flash"


def _main_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of most of a module's numbers; of packed ones the dtype they are computed in."""
    counts = Counter()
    for parameter in module.parameters():
        if parameter.is_floating_point():
            counts[parameter.dtype] += parameter.numel()
    return counts.most_common(1)[0][0]


def _largest_group(model: AlignGPTForConditionalGeneration) -> int:
    """Numbers of the largest piece that sharded weights are gathered in: a layer, or embedding and head."""
    layers = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    sizes = [sum(p.numel() for p in layer.parameters()) for group in layers for layer in group]
    ends = [model.get_input_embeddings().weight, model.lm_head.weight]
    unique = {id(weight): weight.numel() for weight in ends}
    return max([*sizes, sum(unique.values())])


def _image_bytes(model: AlignGPTForConditionalGeneration, images: int, compute: int) -> int:
    """One layer of the frozen tower at work, what it hands over, and what the projector keeps."""
    config, vision = model.config, model.config.vision_config
    positions = images * config.image_seq_length
    layer = 4 * vision.hidden_size + 2 * vision.intermediate_size
    projector = config.projector_in_features + 3 * config.text_config.hidden_size
    return compute * positions * (layer + projector)


def describe_bytes(number: float) -> str:
    """`1.5 GiB`, `34.0 MiB`, ..."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(int(math.log(number, 1024)), len(units) - 1) if number >= 1 else 0
    return f"{number / 1024**power:.{1 if power else 0}f} {units[power]}"


def memory_table(
    model: AlignGPTForConditionalGeneration, batch: Batch, num_devices: int, **settings: Any
) -> dict[str, dict[str, MemoryEstimate]]:
    """Estimates of every strategy over `num_devices`, each `with` and `without` checkpointing."""
    strategies = STRATEGIES[1:] if num_devices > 1 else STRATEGIES[:1]
    return {
        strategy: {
            word: estimate_memory(
                model, batch, strategy=strategy, num_devices=num_devices, checkpointing=on, **settings
            )
            for word, on in (("with", True), ("without", False))
        }
        for strategy in strategies
    }
