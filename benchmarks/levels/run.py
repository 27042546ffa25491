"""Runs the experiment of plan.md: `python -m benchmarks.levels.run --world blind --part captions --seeds 100 101`.

Each finished run is a line of `OUTPUT/WORLD-PART.jsonl`; what is there is not run again.
"""

import argparse
import json
import time
from functools import cached_property
from pathlib import Path

import torch

from aligngpt_playground.captions import exact_caption
from aligngpt_playground.evaluate import objects_named, score_answer
from aligngpt_playground.scenes import Scene

from .arms import LEVELS, OPEN, STAGE_1, STAGE_2, Arm, rows_of, tuned
from .judging import Captions, judge
from .student import ANSWER, CAPTION, Budget, Format, Student, train
from .worlds import Pairs, World


PAIRS, HELDOUT, NOISY = 3_200, 400, 1_920
HELDOUT_SEED, NOISY_SEED = 50_000, 70_000
PARTS = {
    # stage 1, language model frozen; stage 1 with the language model open; stage 2 on noisy descriptions
    "captions": (STAGE_1, Budget()),
    "open": (OPEN, Budget(language_rate=1e-3)),
    "answers": (STAGE_2, Budget(steps=180, rate=1e-3, language_rate=1e-3)),
}
MEASURES = ("all objects", "exact", "main object", "absent object")
JUDGES = ("none", "robust, fast", "shuffled")
"""Arms of part `captions` that also judge captions; see judging.py."""


def measure(texts: list[str], scenes: list[Scene]) -> dict[str, str]:
    """For each of `MEASURES` a string of 0 and 1, one for each image: intervals draw images anew."""
    named = [objects_named(text) for text in texts]
    pairs = list(zip(texts, named, scenes, strict=True))
    hits = {
        "all objects": [set(found) == set(scene.names) for _, found, scene in pairs],
        "exact": [score_answer(text, exact_caption(scene)) for text, _, scene in pairs],
        "main object": [scene.main_object in found for _, found, scene in pairs],
        "absent object": [bool(set(found) - set(scene.names)) for _, found, scene in pairs],
    }
    return {name: "".join("01"[hit] for hit in hits[name]) for name in MEASURES}


class Seed:
    """What the arms of a seed share: pairs, noisy rows, held-out images."""

    def __init__(self, world: World, seed: int, pairs: int = PAIRS):
        self.world, self.seed = world, seed
        self.pairs: Pairs = world.pairs(pairs, seed)
        self.heldout: Pairs = world.pairs(HELDOUT, HELDOUT_SEED + seed, "heldout")

    @cached_property
    def noisy(self) -> Pairs:
        """Descriptions of stage 2."""
        return self.world.pairs(NOISY, NOISY_SEED + self.seed)

    def run(self, part: str, arm: Arm, budget: Budget, language_model: Path | None = None) -> dict:
        """Trains one arm and measures it."""
        started, form = time.perf_counter(), CAPTION
        student = Student(language_model, self.seed)
        rows = rows_of(arm, self.pairs.features, self.pairs.captions, self.pairs.scores, self.seed)
        # stage 1 trains each row at its own level, also where the gate mixes the levels in stage 2
        first = tuned(arm, mixed=False)
        loss = train(student, first, CAPTION, rows, PARTS["captions"][1] if part == "answers" else budget, self.seed)
        if part == "answers":
            form = ANSWER
            rows = rows_of(arm, self.noisy.features, self.noisy.captions, self.noisy.scores, self.seed)
            loss = train(student, arm, ANSWER, rows, budget, self.seed)
        found = {"loss": round(loss, 4), "top": self.describe(student, arm, form, LEVELS - 1)}
        if arm.cut is not None and not arm.mixed:
            found["lowest"] = self.describe(student, arm, form, 0)
            found["counts"] = torch.bincount(rows.levels, minlength=LEVELS).tolist()
        if part == "captions" and arm in [STAGE_1[name] for name in JUDGES]:
            found["judging"] = judge(student, arm, self.pairs, Captions(self.world, self.heldout, self.seed))
        return {**found, "seconds": round(time.perf_counter() - started, 1)}

    def describe(self, student: Student, arm: Arm, form: Format, level: int) -> dict[str, str]:
        return measure(student.write(arm, form, self.heldout.features, level), self.heldout.scenes)


def share(bits: str) -> float:
    return bits.count("1") / len(bits)


def finished(path: Path) -> set[tuple[str, int]]:
    if not path.is_file():
        return set()
    runs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {(run["arm"], run["seed"]) for run in runs}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=("small", "blind"), default="blind")
    parser.add_argument("--part", choices=tuple(PARTS), default="captions")
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--arms", nargs="+", help="names of arms (default: all of the part)")
    parser.add_argument("--language-model", type=Path, help="another seed's tiny Llama (default: the package's)")
    parser.add_argument("--name", default="", help="put behind the arms' names, for the grid of development seeds")
    parser.add_argument("--rate", type=float, help="peak learning rate (grid)")
    parser.add_argument("--table-rate", type=float, help="the table's over the projector's (grid)")
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--steps", type=int, help="steps of the part")
    parser.add_argument("--output", type=Path, default=Path("runs/levels"))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    arms, budget = PARTS[args.part]
    changed = {"rate": args.rate, "steps": args.steps}
    budget = Budget(**{**vars(budget), **{name: value for name, value in changed.items() if value is not None}})
    path = args.output / f"{args.world}-{args.part}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    world, there = World(args.world, args.output), finished(path)
    for seed in args.seeds:
        left = [name for name in args.arms or arms if (name + args.name, seed) not in there]
        work = Seed(world, seed, args.pairs) if left else None
        for name in left:
            arm = arms[name] if args.table_rate is None else tuned(arms[name], table_rate=args.table_rate)
            run = {"arm": name + args.name, "seed": seed, **work.run(args.part, arm, budget, args.language_model)}
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(run) + "\n")
            shown = ", ".join(f"{key} {share(bits):.3f}" for key, bits in run["top"].items())
            print(f"{args.world} {args.part} seed {seed} {run['arm']}: {shown}; {run['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
