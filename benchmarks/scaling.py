"""
Cost model of scoring and both stages on many GPUs: floating-point operations counted on the real modules, interconnect
speeds from public data sheets, and a utilisation that is calibrated on public training hours or measured.

    python benchmarks/scaling.py [--measured seven_billion.json] [--output scaling.json]

The operations are counted by torch's FlopCounterMode over the model at its full size on the meta device: no weight is
allocated and no GPU is needed. docs/scaling.md shows and explains what it prints.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, AutoModelForCausalLM, CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, LlamaConfig

from modeling_aligngpt.modeling_aligngpt import AlignGPTMLP


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU in nodes of eight. Speeds are one direction's, for each GPU."""

    name: str
    peak_flops: float  # dense bf16, FLOP/s
    memory: float  # bytes
    inside_node: float  # NVLink, bytes/s
    between_nodes: float  # network, bytes/s


GPUS = {
    # data sheets: A100 SXM 80 GB (312 TFLOP/s, NVLink 3: 600 GB/s both ways), one HDR 200 Gbit/s port a GPU
    "a100": Gpu("A100-80G", 312e12, 80e9, 300e9, 25e9),
    # H100 SXM (989 TFLOP/s, NVLink 4: 900 GB/s both ways), one NDR 400 Gbit/s port a GPU
    "h100": Gpu("H100-80G", 989e12, 80e9, 450e9, 50e9),
}
LANGUAGE_MODELS = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}
VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
TEXT_TOWER = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
IMAGE_TOKENS = 576
GPUS_A_NODE = 8
# rows, global batch (paper) and mean positions of a row, padding included: short captions; the mix of conversations
STAGES = {"stage 1": (558_128, 256, IMAGE_TOKENS + 44), "stage 2": (665_298, 128, IMAGE_TOKENS + 274)}
# LLaVA-1.5 with the same data and sizes on 8 A100-80G, as its authors report
PUBLIC_HOURS = {("7B", "stage 1"): 3.5, ("7B", "stage 2"): 10.0, ("13B", "stage 1"): 5.5, ("13B", "stage 2"): 20.0}
# share of the peak that large matrix products of a frozen encoder reach, where nothing is measured
SCORING_UTILISATION = 0.5
# communication that runs beside computation
OVERLAP = 0.8
# JPEG of 500 pixels decoded, resized and cropped by Pillow on one core, images a second
DECODE_RATE = 120.0
JPEG_BYTES = 60e3


def language_config(size: str) -> LlamaConfig:
    return LlamaConfig(vocab_size=32_064, max_position_embeddings=4096, **LANGUAGE_MODELS[size])


def _counted(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@cache
def image_flops(size: str) -> dict[str, int]:
    """FLOP of one image: the frozen tower's forward, the projector's forward."""
    hidden_size = LANGUAGE_MODELS[size]["hidden_size"]
    with torch.device("meta"):
        tower = AutoModel.from_config(CLIPVisionConfig(**VISION))
        projector = AlignGPTMLP(VISION["hidden_size"], hidden_size, hidden_size, "gelu")
        pixels = torch.empty(1, 3, VISION["image_size"], VISION["image_size"])
        features = torch.empty(1, IMAGE_TOKENS, VISION["hidden_size"])
    with torch.no_grad():
        return {"tower": _counted(lambda: tower(pixels)), "projector": _counted(lambda: projector(features))}


@cache
def language_flops(size: str, positions: int) -> dict[str, int]:
    """FLOP of one row: forward, and backward with frozen and with trained weights (without recomputing)."""
    config = language_config(size)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        embeds = torch.empty(1, positions, config.hidden_size, requires_grad=True)
        # a finished mask: making one looks at positions, which the meta device does not have
        inputs = {"inputs_embeds": embeds, "attention_mask": torch.zeros(1, 1, positions, positions)}

    def step():
        model(**inputs, use_cache=False).logits.sum().backward()

    with torch.no_grad():
        forward = _counted(lambda: model(**inputs, use_cache=False))
    trained = _counted(step) - forward
    model.requires_grad_(False)
    return {"forward": forward, "backward_frozen": _counted(step) - forward, "backward_trained": trained}


@cache
def scoring_flops() -> int:
    """FLOP of one pair under CLIP ViT-L/14-336."""
    with torch.device("meta"):
        text = CLIPTextModel(CLIPTextConfig(**TEXT_TOWER))
        ids = torch.zeros(1, 77, dtype=torch.long)
    with torch.no_grad():
        # by hand for the text: its pooling looks at token ids, which the meta device does not have
        layers = sum(p.numel() for name, p in text.named_parameters() if "embedding" not in name)
    return image_flops("7B")["tower"] + 2 * layers * ids.shape[1]


def row_flops(size: str, stage: str) -> float:
    """FLOP that one training row takes, with gradient checkpointing (one more forward of the language model)."""
    _, _, positions = STAGES[stage]
    language, image = language_flops(size, positions), image_flops(size)
    backward = language["backward_frozen" if stage == "stage 1" else "backward_trained"]
    return 2 * language["forward"] + backward + image["tower"] + 3 * image["projector"]


def parameters(size: str) -> tuple[int, int]:
    """(of the language model, of the projector)."""
    with torch.device("meta"):
        language = AutoModelForCausalLM.from_config(language_config(size))
        projector = AlignGPTMLP(VISION["hidden_size"], *2 * [LANGUAGE_MODELS[size]["hidden_size"]], "gelu")
    return sum(p.numel() for p in language.parameters()), sum(p.numel() for p in projector.parameters())


def utilisation(size: str, stage: str, measured: dict[str, float] | None) -> float:
    """Share of the peak: measured on one GPU where that was done, else what explains the public hours on 8 A100."""
    if measured and (key := f"{size} {stage}") in measured:
        return measured[key]
    seconds = PUBLIC_HOURS[size, stage] * 3600
    return row_flops(size, stage) * STAGES[stage][0] / (seconds * GPUS_A_NODE * GPUS["a100"].peak_flops)


@dataclass
class Plan:
    """One stage on a number of GPUs. Times in seconds for one optimizer step."""

    model: str
    stage: str
    gpu: str
    gpus: int
    config: str
    global_batch: int
    rows_a_gpu: float
    compute: float
    communication: float
    step: float
    hours: float
    gpu_hours: float
    bottleneck: str


def communication(size: str, stage: str, config: str, gpu: Gpu, gpus: int) -> float:
    """Seconds of traffic in a step of one micro-batch: ring collectives, bf16."""
    language, projector = parameters(size)
    trained = projector if stage == "stage 1" else language + projector
    link = gpu.inside_node if gpus <= GPUS_A_NODE else gpu.between_nodes
    if config in ("ddp", "zero2"):
        # every gradient is summed over all and the result is back on all
        return 2 * 2 * trained / link
    if config == "hybrid":
        # whole parameters travel inside a node; between nodes an eighth of the gradients
        return 3 * 2 * trained / gpu.inside_node + 2 * 2 * trained / GPUS_A_NODE / gpu.between_nodes
    # parameters gathered for forward and for backward, gradients scattered
    return 3 * 2 * trained / link


def plan(size: str, stage: str, gpu: Gpu, gpus: int, config: str, measured: dict[str, float] | None = None) -> Plan:
    """What a stage takes. The paper's global batch, or one row a GPU where there are more GPUs than rows in it."""
    rows, batch, _ = STAGES[stage]
    batch = max(batch, gpus)
    rows_a_gpu = batch / gpus
    compute = rows_a_gpu * row_flops(size, stage) / (gpu.peak_flops * utilisation(size, stage, measured))
    traffic = communication(size, stage, config, gpu, gpus)
    # what overlaps is hidden as long as computation lasts
    hidden = min(traffic * OVERLAP, compute)
    step = compute + traffic - hidden
    hours = rows / batch * step / 3600
    return Plan(
        size,
        stage,
        gpu.name,
        gpus,
        config,
        batch,
        rows_a_gpu,
        compute,
        traffic,
        step,
        hours,
        hours * gpus,
        "computation" if traffic - hidden < 0.1 * compute else "communication",
    )


def state_bytes(size: str, stage: str, config: str, gpus: int) -> float:
    """Bytes on each GPU that do not depend on the batch: weights, gradients, AdamW's state."""
    language, projector = parameters(size)
    tower = 304e6
    if stage == "stage 1":
        return 2 * (language + tower) + 16 * projector
    shards = min(gpus, GPUS_A_NODE) if config == "hybrid" else gpus
    if config == "ddp":
        return 2 * tower + 16 * (language + projector)
    if config == "zero2":
        return 2 * tower + (4 + 12 / gpus) * (language + projector)
    return 2 * tower + 16 * (language + projector) / shards


def scoring(gpu: Gpu, gpus: int, pairs: float) -> dict[str, float]:
    """Hours, and the cores and bytes a second for each GPU that keep it busy."""
    rate = gpu.peak_flops * SCORING_UTILISATION / scoring_flops()
    return {
        "gpu": gpu.name,
        "gpus": gpus,
        "pairs": pairs,
        "pairs_a_second_a_gpu": rate,
        "cores_a_gpu": rate / DECODE_RATE,
        "megabytes_a_second_a_gpu": rate * JPEG_BYTES / 1e6,
        "hours": pairs / rate / gpus / 3600,
        "gpu_hours": pairs / rate / 3600,
    }


def best_config(size: str, stage: str, gpu: Gpu, gpus: int, measured: dict[str, float] | None) -> Plan:
    """The fastest configuration whose state leaves 40 % of the memory to activations."""
    configs = ["ddp"] if stage == "stage 1" else ["zero2", "zero3", "hybrid"]
    fitting = [c for c in configs if state_bytes(size, stage, c, gpus) < 0.6 * gpu.memory]
    return min(
        (plan(size, stage, gpu, gpus, c, measured) for c in fitting), key=lambda p: (round(p.hours, 3), p.config)
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--measured", type=Path, help='what seven_billion.py wrote, or {"7B stage 1": share of the peak, ...}'
    )
    parser.add_argument("--models", nargs="+", choices=tuple(LANGUAGE_MODELS), default=list(LANGUAGE_MODELS))
    parser.add_argument("--output", type=Path, help="JSON to write beside the tables")
    args = parser.parse_args(argv)
    measured = json.loads(args.measured.read_text(encoding="utf-8")) if args.measured else None
    if measured is not None:
        measured = measured.get("utilisation", measured)

    print("| model | stage | TFLOP a row | public hours on 8 A100 | share of the peak that explains them |")
    print("|---|---|---|---|---|")
    for (size, stage), hours in PUBLIC_HOURS.items():
        if size not in args.models:
            continue
        print(
            f"| {size} | {stage} | {row_flops(size, stage) / 1e12:.1f} | {hours} | "
            f"{utilisation(size, stage, None):.2f} |"
        )
    plans = []
    print("\n| model | stage | GPUs | config | global batch | compute s | traffic s | hours | GPU hours | bound by |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for size in args.models:
        for stage in STAGES:
            for gpu in GPUS.values():
                for gpus in (8, 64, 512):
                    p = best_config(size, stage, gpu, gpus, measured)
                    plans.append(p)
                    print(
                        f"| {size} | {stage} | {gpus} {p.gpu} | {p.config} | {p.global_batch} | {p.compute:.2f} | "
                        f"{p.communication:.2f} | {p.hours:.2f} | {p.gpu_hours:.0f} | {p.bottleneck} |"
                    )
    rows = [
        scoring(gpu, gpus, pairs) for pairs in (558_128, 100e6, 10e9) for gpu in GPUS.values() for gpus in (8, 64, 512)
    ]
    print("\n| pairs | GPUs | pairs/s a GPU | cores a GPU | MB/s a GPU | hours | GPU hours |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['pairs']:,.0f} | {row['gpus']} {row['gpu']} | {row['pairs_a_second_a_gpu']:.0f} | "
            f"{row['cores_a_gpu']:.1f} | {row['megabytes_a_second_a_gpu']:.0f} | {row['hours']:.2f} | "
            f"{row['gpu_hours']:,.0f} |"
        )
    if args.output:
        args.output.write_text(json.dumps({"plans": [asdict(p) for p in plans], "scoring": rows}, indent=1))


if __name__ == "__main__":
    main()
