"""
The paper's sizes on one GPU: both stages and generation in bfloat16, AlignGPT beside LLaVA, random weights.

    python benchmarks/seven_billion.py --device cuda                      # Vicuna-7B, CLIP ViT-L/14-336; 80 GB or more
    python benchmarks/seven_billion.py --device cuda --scale 13b --work stage1 generate
    python benchmarks/seven_billion.py --scale tiny                       # anywhere

Stage 2 holds weights, gradients and AdamW's state in bfloat16 (8 bytes a weight, 56 GB at 7B): the step of one GPU of a
run whose state is sharded over eight. Gradient checkpointing is on, as in the paper. MFU counts the operations that the
model needs; what checkpointing computes again counts in HFU alone. The JSON's `utilisation` is HFU by stage, which
`scaling.py --measured` takes. `seven_billion.md` has figures.
"""

import argparse
import warnings
from typing import Any

import common
import torch
from common import Contender
from pairs import SCALES, make_pair, make_rows
from torch import nn


# dense bfloat16 TFLOP/s by a part of the device's name
PEAKS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "A800": 312.0, "L40S": 362.0, "B200": 2250.0}
WORKS = ("stage1", "stage2", "generate")
# rows a GPU and step, words behind the image: the paper's 8 and 16 rows need eight GPUs' memory, here 8 and 4
SHAPES = {"stage1": (8, 44), "stage2": (4, 274), "generate": (8, 64)}


def linear_weights(module: nn.Module) -> int:
    """Weights that take part in a matrix product at every position."""
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


def forward_flops(model: nn.Module, rows: int, positions: int) -> dict[str, float]:
    """Operations of a forward pass: two for each weight and position, and attention (scores and values, not halved)."""
    inner, text, vision = model.model, model.config.text_config, model.config.vision_config
    images = model.config.image_seq_length + 1
    attention = 4 * positions**2 * text.hidden_size * text.num_hidden_layers
    tower = linear_weights(inner.vision_tower) * images + 2 * images**2 * vision.hidden_size * vision.num_hidden_layers
    projector = linear_weights(inner.multi_modal_projector) * model.config.image_seq_length
    language = 2 * (linear_weights(inner.language_model) + linear_weights(model.lm_head)) * positions + attention
    return {"tower": 2.0 * tower * rows, "projector": 2.0 * projector * rows, "language": float(language * rows)}


def step_flops(model: nn.Module, work: str, rows: int, positions: int) -> tuple[float, float]:
    """Operations that a training step needs, and those that it does with gradient checkpointing."""
    forward = forward_flops(model, rows, positions)
    # a frozen matrix product has one product backward (for its input), a trained one two
    backward = forward["language"] * (1 if work == "stage1" else 2)
    needed = forward["tower"] + 3 * forward["projector"] + forward["language"] + backward
    return needed, needed + forward["language"]


def training_step(model: nn.Module, inputs: dict, labels: torch.Tensor, lr: float = 1e-6, **kwargs) -> Contender:
    """Forward, backward and AdamW, whose state the first step makes."""
    parameters = list({id(p): p for p in model.parameters() if p.requires_grad}.values())
    optimizer = torch.optim.AdamW(parameters, lr=lr, fused=parameters[0].device.type == "cuda")

    def run():
        model(**inputs, labels=labels, **kwargs).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Contender(run)


def set_stage(model, llava, work: str) -> None:
    inner = model.model
    for module in (model, llava):
        module.requires_grad_(False)
        module.train()
        module.gradient_checkpointing_enable({"use_reentrant": False})
        module.enable_input_require_grads()
    parts = [inner.multi_modal_projector]
    parts += [inner.align_embeddings] if work == "stage1" else [inner.language_model, model.lm_head, inner.align_gate]
    for part in parts:
        part.requires_grad_(True)


def measure(work: str, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The contenders in turns of `--repeats` steps each, not step by step: two optimizer states would not fit."""
    dtype = getattr(torch, args.dtype)
    model, llava = make_pair(args.scale, device, dtype)
    batch, text = args.batch or SHAPES[work][0], args.text or SHAPES[work][1]
    rows = make_rows(model.config, batch, text, max(1, text // 2), device, dtype)
    record: dict[str, Any] = {"rows": batch, "positions": rows.positions // batch, "contenders": {}}
    makers = {}
    if work == "generate":
        search = {"max_new_tokens": args.tokens, "min_new_tokens": args.tokens, "do_sample": False}
        makers["aligngpt"] = lambda: Contender(lambda: model.generate(**rows.ours, **search))
        makers["llava"] = lambda: Contender(lambda: llava.generate(**rows.llava, **search))
    else:
        set_stage(model, llava, work)
        levels = {"align_level": rows.levels} if work == "stage1" else {}
        makers["aligngpt"] = lambda: training_step(model, rows.ours, rows.labels, **levels)
        makers["llava"] = lambda: training_step(llava, rows.llava, rows.labels)
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    peak = dict.fromkeys(makers, 0)
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    if work != "generate":  # AdamW's two numbers for each trained weight stay from step to step
        held += sum(2 * p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    for turn in range(args.turns):
        for name in makers if turn % 2 == 0 else reversed(makers):
            contender = makers[name]()
            measured = common.interleave({name: contender}, device, args.repeats, args.warmup, args.clock)
            seconds[name] += measured.seconds[name]
            peak[name] = max(peak[name], held + common.peak_bytes(contender, device))
            model.zero_grad(set_to_none=True)
            del contender
            if device.type == "cuda":
                torch.cuda.empty_cache()
    for name, taken in seconds.items():
        record["contenders"][name] = {"seconds": taken, "peak": peak[name]}
    middles = {name: common.quartiles(taken)[1] for name, taken in seconds.items()}
    record["ratio"] = middles["aligngpt"] / middles["llava"]
    if work != "generate":
        record["needed_flops"], record["done_flops"] = step_flops(model, work, batch, record["positions"])
    return record


def peak_flops(args: argparse.Namespace) -> float | None:
    if args.peak_tflops:
        return args.peak_tflops * 1e12
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else ""
    return next((1e12 * peak for part, peak in PEAKS.items() if part in name), None)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_arguments(parser, "seven_billion", repeats=5, scales=["7b", *(name for name in SCALES if name != "7b")])
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--work", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--turns", type=int, default=2, help="times that either contender is on, default: %(default)s")
    parser.add_argument("--batch", type=int, help="rows of a step; default: 8, 4 and 8")
    parser.add_argument("--text", type=int, help="words behind the image; default: 44, 274 and 64")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of an answer, default: %(default)s")
    parser.add_argument(
        "--peak-tflops", type=float, help="of the device in bfloat16, where this script does not know it"
    )
    args = parser.parse_args(argv)
    device = common.start(args)
    warnings.filterwarnings("ignore", category=FutureWarning)
    if args.scale in ("7b", "13b") and device.type == "cpu":
        raise SystemExit(f"--scale {args.scale} needs a GPU: --device cuda. --scale tiny runs anywhere.")
    facts, peak = common.machine(args), peak_flops(args)
    common.print_header(facts)
    records, lines, utilisation = {}, [], {}
    for work in args.work:
        record = records[work] = measure(work, args, device)
        for name, values in record["contenders"].items():
            median = common.quartiles(values["seconds"])[1]
            tokens = record["rows"] * (args.tokens if work == "generate" else record["positions"])
            mfu = hfu = achieved = ""
            if work != "generate":
                achieved = f"{record['done_flops'] / median / 1e12:.3g}"
                if peak:
                    mfu = f"{record['needed_flops'] / median / peak:.1%}"
                    hfu = f"{record['done_flops'] / median / peak:.1%}"
                    if name == "aligngpt":
                        size = args.scale.upper()
                        utilisation[f"{size} stage {work[-1]}"] = record["done_flops"] / median / peak
            lines.append([
                work, name, f"{record['rows']} x {record['positions']}", common.milliseconds(median),
                f"{tokens / median:.0f}", f"{record['rows'] / median:.2f}", achieved, mfu, hfu,
                f"{values['peak'] / 2**30:.2f}", f"{record['ratio']:.3f}" if name == "llava" else "",
            ])  # fmt: skip
    columns = ["work", "contender", "rows x positions", "ms (median)", "tokens/s", "samples/s", "TFLOP/s", "MFU", "HFU",
               "peak GB", "AlignGPT's time over LLaVA's"]  # fmt: skip
    common.print_table(columns, lines)
    content = {"machine": facts, "scale": args.scale, "works": records, "utilisation": utilisation}
    common.write_json(args.output, content)


if __name__ == "__main__":
    main()
