"""
The memory table of docs/hardware.md: what each stage of Vicuna 7B and 13B takes on a GPU, estimated on the meta device.

    python benchmarks/memory.py        # a minute, no GPU, no weights

Weights, gradients and optimizer states follow from the parameters and are exact. Activations are what autograd saves,
counted by running the language model's own code on fake tensors (shapes and dtypes without storage). What the allocator
loses to fragmentation and the GPU's own context are not in it.
"""

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass
from functools import lru_cache, partial

import torch
from peft import get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AutoModel, CLIPVisionConfig, LlamaConfig, PretrainedConfig
from transformers.masking_utils import AttentionMaskInterface

from aligngpt_trainers.commands.arguments import LoraArguments
from aligngpt_trainers.lora import lora_config
from aligngpt_trainers.memory import optimizer_bytes
from modeling_aligngpt import AlignGPTConfig, AlignGPTForConditionalGeneration


STRATEGIES = ("none", "ddp", "zero2", "zero3", "fsdp2")
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


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


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
        print(f"Activations of {config.model_type} could not be counted ({type(error).__name__}: {error}).")
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


CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
SIZES = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}
# 4 bits, and the constants of 64 weights quantised twice (QLoRA, section 3)
NF4_BITS = 4.127
PAIRS, CONVERSATIONS = Batch(8, 640, 8, 8 * 40), Batch(16, 1100, 16, 16 * 250)
FEW_CONVERSATIONS = Batch(4, 1100, 4, 4 * 250)


def make(size: str) -> AlignGPTForConditionalGeneration:
    """A model of the paper's sizes in bfloat16, without storage."""
    vision = CLIPVisionConfig(**CLIP_L, image_size=336, patch_size=14).to_dict()
    text = LlamaConfig(**SIZES[size], vocab_size=32064).to_dict()
    config = AlignGPTConfig(vision_config=vision, text_config=text, align_mode="gate")
    with torch.device("meta"):
        return AlignGPTForConditionalGeneration(config).to(torch.bfloat16)


def train(model: nn.Module, *modules: nn.Module) -> None:
    """Freezes the model but for modules, which go to float32, as the trainers do."""
    model.requires_grad_(False)
    for module in modules:
        module.to(torch.float32).requires_grad_(True)


def estimates(size: str) -> dict[str, float]:
    """GiB of each way to train."""

    def total(model: nn.Module, batch: Batch, strategy: str = "none", devices: int = 1) -> float:
        estimate: MemoryEstimate = estimate_memory(
            model, batch, autocast=torch.bfloat16, strategy=strategy, num_devices=devices
        )
        return estimate.total / 2**30

    model = make(size)
    inner = model.model
    train(model, inner.multi_modal_projector, inner.align_embeddings)
    found = {"stage 1, batch 8, each GPU": total(model, PAIRS)}
    model = make(size)
    inner = model.model
    train(model, inner.language_model, model.lm_head, inner.multi_modal_projector, inner.align_gate)
    found["stage 2 whole, batch 16, 8 GPUs, ZeRO-3"] = total(model, CONVERSATIONS, "zero3", 8)
    found["stage 2 whole, batch 16, 8 GPUs, FSDP2"] = total(model, CONVERSATIONS, "fsdp2", 8)
    model = make(size)
    adapted = get_peft_model(model, lora_config(LoraArguments(use_peft=True, lora_r=128, lora_alpha=256), model))
    for parameter in adapted.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    found["stage 2 LoRA (rank 128), batch 16, 8 GPUs, DDP"] = total(adapted, CONVERSATIONS, "ddp", 8)
    one = found["stage 2 LoRA (rank 128), batch 4, one GPU"] = total(adapted, FEW_CONVERSATIONS)
    quantised = sum(p.numel() for name, p in adapted.named_parameters() if name.endswith("base_layer.weight"))
    found["stage 2 QLoRA (rank 128, nf4), batch 4, one GPU"] = one - quantised * (2 - NF4_BITS / 8) / 2**30
    return found


def main() -> None:
    """Prints the table in Markdown."""
    columns = {size: estimates(size) for size in SIZES}
    print("| | " + " | ".join(f"{size}, GiB" for size in SIZES) + " |\n|" + "---|" * (1 + len(SIZES)))
    for row in columns["7B"]:
        print(f"| {row} | " + " | ".join(f"{columns[size][row]:.1f}" for size in SIZES) + " |")


if __name__ == "__main__":
    main()
