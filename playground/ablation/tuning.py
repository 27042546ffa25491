"""
Tuning after stage 2 on the small world: does a model that names absent objects stop doing so?

    python -m aligngpt_playground tuning --seeds 3 --output runs/tuning

The model begins from noisy descriptions (the gate's row of the ablation on noisy data), which taught it to name objects
that are not there. It is then tuned three ways, each from the same model and on the same new images: by preference
pairs (the exact description against one with an absent object) with DPO; by the same exact descriptions alone, as many
steps of stage 2 (what the pairs know without their rejected half); and by GRPO, whose reward is the judge of the
seed's own stage 1, which has seen no right answer to these images.
"""

import argparse
import json
import os
import random
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aligngpt_shared.files import write_json

from .. import measures
from ..captions import DESCRIBE, alter, exact_caption
from ..evaluate import scenes_of
from ..scenes import Scene, draw_scenes, render
from .rows import make_world, silent
from .seed import SeedRuns
from .table import half_width
from .variants import VARIANTS, Settings


IMAGES_SEED = 700
"""Added to a seed for the images of tuning, which no stage has seen."""
START = next(variant for variant in VARIANTS if variant.name == "noisy: gate + global")
WAYS = ("stage 2", "dpo", "grpo")
TABLE_NAME = "table.json"


@dataclass(frozen=True)
class TuningSettings:
    """What the figures depend on, beside the ablation's settings of the stages before.

    Args:
        images: that are tuned on.
        batch_size: pairs, rows or answers of a step.
        steps: of DPO and of stage 2.
        learning_rate: of DPO and of stage 2. beta: of DPO.
        sft_weight: of the likelihood of the preferred answer in DPO, without which both answers become unlikely.
        grpo_steps, grpo_learning_rate, grpo_beta, generations: of GRPO; `generations` answers to a prompt.
    """

    images: int = 640
    batch_size: int = 32
    steps: int = 60
    learning_rate: float = 3e-4
    beta: float = 0.1
    sft_weight: float = 1.0
    grpo_steps: int = 60
    grpo_learning_rate: float = 1e-4
    grpo_beta: float = 0.05
    generations: int = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m aligngpt_playground tuning`."""
    stages, tuning = Settings(3200, 300, 1920, 320), TuningSettings()
    parser.add_argument("--output", type=Path, default=Path("runs/tuning"), help="folder to write (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds, from 0 on (%(default)s)")
    parser.add_argument("--pairs", type=int, default=stages.pairs, help="pairs of stage 1 (%(default)s)")
    parser.add_argument("--pretrain-steps", type=int, default=stages.pretrain_steps, help="of stage 1 (%(default)s)")
    parser.add_argument("--conversations", type=int, default=stages.conversations, help="of stage 2 (%(default)s)")
    parser.add_argument("--heldout", type=int, default=stages.heldout, help="held-out images (%(default)s)")
    parser.add_argument("--images", type=int, default=tuning.images, help="images that are tuned on (%(default)s)")
    parser.add_argument("--steps", type=int, default=tuning.steps, help="steps of DPO (%(default)s)")
    parser.add_argument("--grpo-steps", type=int, default=tuning.grpo_steps, help="steps of GRPO (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Run what is missing and print the table; the exit status."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for name in ("seeds", "pairs", "pretrain_steps", "conversations", "heldout", "images", "steps", "grpo_steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    stages = Settings(args.pairs, args.pretrain_steps, args.conversations, args.heldout)
    tuning = TuningSettings(images=args.images, steps=args.steps, grpo_steps=args.grpo_steps)
    output = args.output.absolute()
    facts = {"stages": asdict(stages), "tuning": asdict(tuning)}
    path = output / "settings.json"
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != facts:
        raise ValueError(f"{output} holds runs with other settings: use the same, or another --output")
    output.mkdir(parents=True, exist_ok=True)
    write_json(path, facts)
    runs = []
    for seed in range(args.seeds):
        done = output / f"seed-{seed}.json"
        if not done.is_file():
            write_json(done, run_seed(seed, stages, tuning, output / f"seed-{seed}"))
            shutil.rmtree(output / f"seed-{seed}", ignore_errors=True)
        runs.append(json.loads(done.read_text(encoding="utf-8")))
        print(f"seed {seed}: " + ", ".join(f"{way} {_shown(runs[-1][way])}" for way in ("start", *WAYS)), flush=True)
    table = summarize(runs)
    write_json(output / TABLE_NAME, {"table": table, **facts})
    for way, row in table.items():
        print(
            f"{way}: "
            + ", ".join(f"{name} {value:+.3f}" if "-" in name else f"{name} {value:.3f}" for name, value in row.items())
        )
    return 0


def _shown(figures: dict[str, float]) -> str:
    return f"absent {figures['absent object']:.3f} exact {figures['exact']:.3f}"


def summarize(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Means over seeds, and the paired differences to the start with half the width of their 95 % intervals."""
    table = {}
    for way in ("start", *WAYS):
        row: dict[str, float] = {}
        for name in ("absent object", "exact", "all objects", "words"):
            row[name] = measures.mean([run[way][name] for run in runs])
            differences = [run[way][name] - run["start"][name] for run in runs]
            if way != "start" and name in ("absent object", "exact"):
                row[f"{name} - start"] = measures.mean(differences)
                if len(runs) > 1:
                    row[f"{name} interval"] = half_width(differences)
        table[way] = row
    return table


def run_seed(seed: int, stages: Settings, tuning: TuningSettings, folder: Path) -> dict[str, Any]:
    """A seed's model before and after each way of tuning, by `describe_captions` on held-out images."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    work = SeedRuns(folder, seed, stages, make_world(folder, seed, stages, None), None)
    start = folder / "start"
    if not (start / "config.json").is_file():
        work.instruct(START, save_to=start)
    found: dict[str, Any] = {"seed": seed, "start": _describe(start, work.world)}
    scenes = list(draw_scenes(tuning.images, IMAGES_SEED + seed, "train"))
    rng = random.Random(f"tuning/{seed}")
    images = [render(scene, rng.random()) for scene in scenes]
    for way in WAYS:
        began = time.perf_counter()
        model, processor = _load(start)
        with silent():
            if way == "grpo":
                _grpo(model, processor, images, work.pretrained("levels-8"), tuning, folder, seed)
            elif way == "dpo":
                _dpo(model, processor, images, preference_pairs(scenes, rng), tuning, folder, seed)
            else:
                _stage_two(model, processor, images, scenes, tuning, folder, seed)
        found[way] = {**_figures(model, processor, work.world), "seconds": round(time.perf_counter() - began, 1)}
    return found


def preference_pairs(scenes: list[Scene], rng: random.Random) -> list[tuple[str, str]]:
    """For each scene its exact description, and one in which an object is another that the image does not show."""
    return [(exact_caption(scene), exact_caption(_with_absent_object(scene, rng))) for scene in scenes]


def _with_absent_object(scene: Scene, rng: random.Random) -> Scene:
    while True:
        other = alter(scene, rng)
        if set(other.names) - set(scene.names):
            return other


def _load(folder: Path):
    from modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor

    model = AlignGPTForConditionalGeneration.from_pretrained(folder, dtype="float32")
    return model, AlignGPTProcessor.from_pretrained(folder)


def _describe(folder: Path, world: Path) -> dict[str, float]:
    return _figures(*_load(folder), world)


def _figures(model, processor, world: Path) -> dict[str, float]:
    from datasets import load_from_disk

    heldout = load_from_disk(str(world / "heldout" / "pairs"))["heldout"]
    images = heldout["image"][:]
    texts, _ = measures.LoadedModel(model, processor).answer(images, [DESCRIBE] * len(images))
    return measures.describe_captions(texts, scenes_of(heldout))


def _common(folder: Path, seed: int, steps: int, learning_rate: float) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "unused"),
        "max_steps": steps,
        "learning_rate": learning_rate,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": seed,
    }


def _stage_two(model, processor, images: list, scenes: list[Scene], tuning: TuningSettings, folder: Path, seed: int):
    from datasets import Dataset

    from aligngpt_trainers import AlignGPTInstructConfig, AlignGPTInstructTrainer

    asked = {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": DESCRIBE}]}
    rows = [
        {
            "images": [image],
            "messages": [asked, {"role": "assistant", "content": [{"type": "text", "text": exact_caption(scene)}]}],
        }
        for image, scene in zip(images, scenes, strict=True)
    ]
    common = _common(folder, seed, tuning.steps, tuning.learning_rate)
    config = AlignGPTInstructConfig(
        **common, per_device_train_batch_size=tuning.batch_size, gradient_accumulation_steps=1, overwrite=True
    )
    AlignGPTInstructTrainer(model, config, Dataset.from_list(rows), processing_class=processor).train()


def _dpo(model, processor, images: list, pairs: list, tuning: TuningSettings, folder: Path, seed: int):
    from aligngpt_trainers import AlignGPTDPOConfig, AlignGPTDPOTrainer, load_preferences

    rows = load_preferences(
        [
            {"image": image, "question": DESCRIBE, "chosen": chosen, "rejected": rejected}
            for image, (chosen, rejected) in zip(images, pairs, strict=True)
        ]
    )
    common = _common(folder, seed, tuning.steps, tuning.learning_rate)
    losses = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, tuning.sft_weight]} if tuning.sft_weight else {}
    config = AlignGPTDPOConfig(**common, per_device_train_batch_size=tuning.batch_size, beta=tuning.beta, **losses)
    AlignGPTDPOTrainer(model, config, rows, processing_class=processor).train()


def _grpo(model, processor, images: list, judge: Path, tuning: TuningSettings, folder: Path, seed: int):
    from aligngpt_trainers import AlignGPTGRPOConfig, AlignGPTGRPOTrainer, JudgeReward, load_prompts

    rows = load_prompts([{"image": image, "question": DESCRIBE} for image in images])
    config = AlignGPTGRPOConfig(
        **_common(folder, seed, tuning.grpo_steps, tuning.grpo_learning_rate),
        per_device_train_batch_size=tuning.batch_size,
        num_generations=tuning.generations,
        max_completion_length=48,
        beta=tuning.grpo_beta,
    )
    reward = JudgeReward(str(judge), device="cpu")
    AlignGPTGRPOTrainer(model, reward, config, rows, processing_class=processor).train()
