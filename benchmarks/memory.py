"""
The memory table of docs/training.md: what each stage of Vicuna 7B and 13B takes on a GPU, estimated on the meta device
by what `aligngpt check` uses.

    python benchmarks/memory.py        # a minute, no GPU, no weights
"""

import torch
from peft import get_peft_model
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig

from aligngpt_trainers.commands.arguments import LoraArguments
from aligngpt_trainers.lora import lora_config
from aligngpt_trainers.memory import Batch, MemoryEstimate, estimate_memory
from modeling_aligngpt import AlignGPTConfig, AlignGPTForConditionalGeneration


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
