"""
How well the levels judge captions, beside the score that they were cut from and beside likelihood; benchmarks/judge.md.

For each seed and size a world is drawn and scored, and stage 1 trained by the quickstart's recipe; then held-out
captions of all kinds are judged. Finished runs are kept in the output folder and not made again.

    python benchmarks/judge.py --output runs/judge --seeds 21 22 23 24 25 --pairs 1000 3600

Or models of stage 1 that an ablation has kept (`--keep-models`) are measured in their place:

    python benchmarks/judge.py --output runs/judge --seeds 0 1 2 3 4 \\
        --models "runs/ablation/seed-{seed}/pretrain/levels-8"
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from aligngpt_playground.ablation.table import half_width
from aligngpt_playground.measures import TRUE_KINDS, truth_aucs
from aligngpt_shared.files import write_json


HELDOUT, BATCH = 600, 50
COLUMNS = ("judge", "CLIP score", "both", "likelihood", "likelihood over others")


def calibration(levels: list[float], true: list[bool], bins: int = 4) -> list[tuple[float, float, int]]:
    """(mean level, share of true captions, number) of equally filled bins of the mean level."""
    order = sorted(range(len(levels)), key=levels.__getitem__)
    size = len(order) // bins
    parts = [order[i * size : (i + 1) * size if i < bins - 1 else None] for i in range(bins)]
    return [(mean(levels[i] for i in part), mean(true[i] for i in part), len(part)) for part in parts]


def train(folder: Path, pairs: int, seed: int) -> None:
    """World, scores and stage 1 in `folder`, by the quickstart's recipes."""
    from aligngpt_playground import parts_path

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for part in ("clip", "llama"):
        shutil.copytree(parts_path(part), folder / "parts" / part)
    import aligngpt_playground

    shutil.copytree(Path(aligngpt_playground.__file__).parent / "recipes", folder / "recipes")
    rows = ["--pairs", str(pairs), "--conversations", "1", "--heldout-pairs", "1", "--heldout-conversations", "1"]
    # as many steps whatever the size: what differs is the data alone
    steps = ["--max_steps", "338"] if pairs != 3600 else []
    commands = (
        ["aligngpt_playground", "make", "--output", "data", *rows, "--seed", str(seed)],
        ["aligngpt_trainers", "score", "--config", "recipes/score.yaml"],
        ["aligngpt_trainers", "pretrain", "--config", "recipes/pretrain.yaml", "--seed", str(seed), *steps],
    )
    for command in commands:
        done = subprocess.run([sys.executable, "-m", *command], cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")


def measure(folder: Path, seed: int) -> dict[str, Any]:
    """AUCs of the judge, of CLIP's score, of the likelihood at the top level, plain and over other images."""
    import torch

    from aligngpt_playground import parts_path
    from aligngpt_playground.world import make_pairs
    from aligngpt_trainers.scoring.combine import standardized_mean
    from aligngpt_trainers.scoring.scorer import PairScorer
    from modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor

    model = AlignGPTForConditionalGeneration.from_pretrained(folder).eval()
    processor = AlignGPTProcessor.from_pretrained(folder)
    scorer = PairScorer(str(parts_path("clip")), device="cpu")
    kinds = (*TRUE_KINDS, "wrong", "unrelated")
    rows = make_pairs(HELDOUT, seed=1000 + seed, split="heldout", kinds=kinds)
    values: dict[str, list[float]] = {"judge": [], "CLIP score": [], "likelihood": [], "likelihood over others": []}
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        images, texts = [row["image"] for row in batch], [row["caption"] for row in batch]
        verdict = model.judge(**processor.judge_inputs(images, texts))
        values["judge"] += verdict.mean_level.tolist()
        own = verdict.log_likelihoods[:, -1]
        values["likelihood"] += (own / verdict.num_tokens).tolist()
        values["CLIP score"] += scorer.score(*scorer.preprocess(images, texts)[:2]).tolist()
        others = []
        for shift in (1, 2, 3, 4):
            moved = images[shift:] + images[:shift]
            inputs = processor.judge_inputs(moved, texts)
            with torch.inference_mode():
                logits = model(**{k: v for k, v in inputs.items() if k != "labels"}, align_level=7).logits[:, :-1]
            target = inputs["labels"][:, 1:]
            losses = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), target.flatten(), reduction="none", ignore_index=-100
            )
            others.append(-losses.view(target.shape).sum(1))
        values["likelihood over others"] += (own - torch.stack(others).logsumexp(0)).tolist()
    # as `aligngpt score --add_score` adds them
    values["both"] = standardized_mean(np.array(values["CLIP score"]), np.array(values["judge"]))[0].tolist()
    of_rows = [row["kind"] for row in rows]
    found: dict[str, Any] = {name: truth_aucs(each, of_rows) for name, each in values.items()}
    is_true = [kind in TRUE_KINDS for kind in of_rows]
    found["calibration"] = calibration(values["judge"], is_true)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/judge"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[21, 22, 23, 24, 25])
    parser.add_argument("--pairs", type=int, nargs="+", default=[1000, 3600])
    parser.add_argument("--models", nargs="+", help="folders of stage-1 models, with {seed} in their names")
    args = parser.parse_args()
    started = time.process_time()
    args.output.mkdir(parents=True, exist_ok=True)
    rows = args.models or [f"{pairs} pairs" for pairs in args.pairs]
    for row, seed in tqdm([(row, seed) for seed in args.seeds for row in rows], desc="runs"):
        path = result_path(args.output, row, seed)
        if not path.is_file():
            folder = Path(row.replace("{seed}", str(seed)))
            if not args.models:
                train(args.output / "run", int(row.split()[0]), seed)
                folder = args.output / "run" / "pretrain"
            write_json(path, measure(folder, seed))
    print_table(args.output, rows, args.seeds)
    print(f"{time.process_time() - started:.0f} CPU seconds in this process")


def result_path(output: Path, row: str, seed: int) -> Path:
    """Where the figures of one model are kept."""
    return output / f"{row.replace('/', '_').replace(' ', '-')}-{seed}.json"


def print_table(folder: Path, rows: list[str], seeds: list[int]) -> None:
    """Markdown: mean and spread over seeds, and the judge's lead over CLIP's score: its interval, and seed by seed."""
    print(f"| | | {' | '.join(COLUMNS)} | judge - CLIP | by seed |")
    print("|---|" + "---|" * (len(COLUMNS) + 3))
    for row in rows:
        results = [json.loads(result_path(folder, row, seed).read_text(encoding="utf-8")) for seed in seeds]
        for question in ("true from untrue", "exact from wrong"):
            cells = []
            for name in COLUMNS:
                each = [result[name][question] for result in results]
                cells.append(f"{mean(each):.3f} ± {stdev(each) if len(each) > 1 else 0:.3f}")
            lead = [result["judge"][question] - result["CLIP score"][question] for result in results]
            cells.append(f"{mean(lead):+.3f} ± {half_width(lead):.3f}")
            cells.append(", ".join(f"{value:+.3f}" for value in lead))
            print(f"| {row} | {question} | {' | '.join(cells)} |")
    print("\nShare of true captions by quarter of the judge's mean level (mean level: share):")
    for row in rows:
        found = [json.loads(result_path(folder, row, seed).read_text(encoding="utf-8")) for seed in seeds]
        results = [each["calibration"] for each in found]
        quarters = [f"{mean(r[q][0] for r in results):.2f}: {mean(r[q][1] for r in results):.2f}" for q in range(4)]
        print(f"- {row}: {', '.join(quarters)}")


if __name__ == "__main__":
    main()
