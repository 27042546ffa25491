"""
Peak memory of the commands that write weights, on a made-up checkpoint of the authors' 7B size; big_checkpoints.md.

    python benchmarks/big_checkpoints.py --output runs/big --layers 32

Weights are zeros: their number and shape are what counts. All of it is removed at the end.
"""

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel


HIDDEN, INTERMEDIATE, VOCAB, HEADS = 4096, 11008, 32000, 32
TOWER = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
TOWER |= {"image_size": 336, "patch_size": 14, "projection_dim": 768}
GATE_HIDDEN = 512


def make_checkpoint(folder: Path, tokenizer: Path, layers: int, mixed: bool) -> None:
    """Two `.bin` shards in half precision, the tower inside in float32 where `mixed`, as the authors' may be."""
    folder.mkdir(parents=True)
    half = torch.float16
    weights: dict[str, torch.Tensor] = {"model.embed_tokens.weight": torch.zeros(VOCAB, HIDDEN, dtype=half)}
    for layer in range(layers):
        name = f"model.layers.{layer}."
        for part in ("q", "k", "v", "o"):
            weights[f"{name}self_attn.{part}_proj.weight"] = torch.zeros(HIDDEN, HIDDEN, dtype=half)
        for part in ("gate", "up"):
            weights[f"{name}mlp.{part}_proj.weight"] = torch.zeros(INTERMEDIATE, HIDDEN, dtype=half)
        weights[f"{name}mlp.down_proj.weight"] = torch.zeros(HIDDEN, INTERMEDIATE, dtype=half)
        for part in ("input", "post_attention"):
            weights[f"{name}{part}_layernorm.weight"] = torch.zeros(HIDDEN, dtype=half)
    weights["model.norm.weight"] = torch.zeros(HIDDEN, dtype=half)
    weights["lm_head.weight"] = torch.zeros(VOCAB, HIDDEN, dtype=half)
    with torch.device("meta"):
        tower = CLIPVisionModel(CLIPVisionConfig(**TOWER)).state_dict()
    for name, value in tower.items():
        if not name.endswith("position_ids"):
            inside = "vision_tower.vision_tower.vision_model." + name.removeprefix("vision_model.")
            weights[inside] = torch.zeros(value.shape, dtype=torch.float32 if mixed else half)
    tokens = (TOWER["image_size"] // TOWER["patch_size"]) ** 2
    others = {
        "mm_projector.0": (HIDDEN, TOWER["hidden_size"]),
        "mm_projector.2": (HIDDEN, HIDDEN),
        "gated_weight_layer.mlp.0": (GATE_HIDDEN, tokens),
        "gated_weight_layer.mlp.2": (7, GATE_HIDDEN),
    }
    for name, shape in others.items():
        weights[f"{name}.weight"] = torch.zeros(shape, dtype=half)
        weights[f"{name}.bias"] = torch.zeros(shape[0], dtype=half)
    weights["align_indicators.indicator_embs"] = torch.zeros(8, HIDDEN, dtype=half)
    names, index, bytes_so_far = list(weights), {}, 0
    total = sum(value.numel() * value.element_size() for value in weights.values())
    halves: tuple[list[str], list[str]] = ([], [])
    for name in names:
        halves[bytes_so_far > total // 2].append(name)
        bytes_so_far += weights[name].numel() * weights[name].element_size()
    for number, chosen in enumerate(halves, start=1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: weights.pop(name) for name in chosen}, folder / file)
        index |= dict.fromkeys(chosen, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = json.loads((tokenizer / "config.json").read_text())
    config |= {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": layers}
    config |= {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "vocab_size": VOCAB, "head_dim": 128}
    config |= {"mm_hidden_size": TOWER["hidden_size"], "mm_vision_tower": "tower", "torch_dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config))
    for path in tokenizer.iterdir():
        if "token" in path.name or path.name == "generation_config.json":
            shutil.copyfile(path, folder / path.name)


def make_tower(folder: Path) -> None:
    """A CLIP ViT-L/14-336 of zeros, for the config and the image processor."""
    from transformers import CLIPImageProcessor

    folder.mkdir(parents=True)
    config = CLIPVisionConfig(**TOWER)
    with torch.device("meta"):
        model = CLIPVisionModel(config)
    config.architectures = ["CLIPVisionModel"]
    config.save_pretrained(folder)
    save_file({name: torch.zeros(value.shape) for name, value in model.state_dict().items()},
              folder / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    size = TOWER["image_size"]
    CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}).save_pretrained(folder)


def make_parts(original: Path, tower: Path, tokenizer: Path, layers: int, mixed: bool) -> None:
    make_checkpoint(original, tokenizer, layers, mixed)
    make_tower(tower)


def apart(target, *args: object) -> None:
    """Runs a function in a process of its own: a child's peak begins at what its parent holds."""
    maker = multiprocessing.get_context("spawn").Process(target=target, args=args)
    maker.start()
    maker.join()
    if maker.exitcode:
        raise SystemExit(f"{target.__name__} ended with status {maker.exitcode}.")


def run(*words: object) -> dict:
    """Runs `aligngpt ...`; its peak memory, mapped files included, and its time."""
    started, command = time.time(), [sys.executable, "-m", "aligngpt_trainers", *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{output[-3000:]}")
    return {"command": words[0], "peak GB": usage.ru_maxrss / 1e6, "seconds": time.time() - started}


def largest(folder: Path) -> float:
    """GB of the largest weight file."""
    files = [path for path in folder.iterdir() if path.suffix in (".bin", ".safetensors")]
    return max(path.stat().st_size for path in files) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/big"))
    parser.add_argument("--layers", type=int, default=32, help="of the language model; 32 is 7B")
    parser.add_argument("--mixed", action="store_true", help="the tower inside in float32")
    parser.add_argument("--tokenizer", type=Path, default=Path("tests/fixtures/golden/checkpoint"))
    parser.add_argument("--keep", action="store_true", help="do not remove the checkpoints at the end")
    args = parser.parse_args()
    shutil.rmtree(args.output, ignore_errors=True)
    original, ours = args.output / "original", args.output / "ours"
    tower, back = args.output / "tower", args.output / "back"
    apart(make_parts, original, tower, args.tokenizer, args.layers, args.mixed)
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"largest shard {largest(original):.2f} GB; this process {own:.2f} GB")
    rows = [run("convert", "--checkpoint", original, "--output", ours, "--vision-tower", tower)]
    rows[-1]["largest shard GB"] = max(largest(original), largest(ours))
    shutil.rmtree(original)
    rows.append(run("convert", "--to-original", "--checkpoint", ours, "--output", back))
    rows[-1]["largest shard GB"] = max(largest(back), largest(ours))
    shutil.rmtree(back)
    rows.append(run("export", "--model", ours, "--output", args.output / "llava"))
    rows[-1]["largest shard GB"] = largest(args.output / "llava")
    shutil.rmtree(args.output / "llava")
    shutil.rmtree(ours)
    if not args.keep:
        shutil.rmtree(args.output)
    print("| command | largest shard, GB | peak memory, GB | beyond the shard | seconds |")
    print("|---|---|---|---|---|")
    for row in rows:
        shard, peak = row["largest shard GB"], row["peak GB"]
        print(f"| {row['command']} | {shard:.2f} | {peak:.2f} | {peak - shard:+.2f} | {row['seconds']:.0f} |")


if __name__ == "__main__":
    main()
