"""World two of plan.md, real pictures: `python -m benchmarks.levels.real --part kinds --seeds 100 101`.

`kinds`: a picture's kind in a word or two; four of ten rows name a wrong one. `words`: the sentence, title or keywords
that people wrote, with whatever noise is in them; the language model trains, too. Pictures and features: pictures.py.
"""

import argparse
import json
import random
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from .arms import LEVELS, STAGE_1, Arm, rows_of
from .judging import auc, judge_by_level, log_likelihood
from .run import finished
from .student import CAPTION, Budget, Student, train


HELDOUT, NOISE, CHOICES = 300, 0.4, 8
ARMS = ("none", "robust, fast", "filter 0.7", "filter 0.5", "filter 0.5, levels", "score as text", "shuffled")
PARTS = {"kinds": Budget(steps=300), "words": Budget(steps=300, language_rate=1e-3)}


def cross_fit(pooled: torch.Tensor, texts: torch.Tensor, same: list[str], seed: int) -> torch.Tensor:
    """Score of each row by a dual encoder that was trained on the other half of the rows: projections of DINOv2's and
    MiniLM's states by CLIP's loss, in which equal texts count as one."""
    torch.manual_seed(seed)
    fold = torch.randperm(len(pooled)) % 2
    number = {text: place for place, text in enumerate(dict.fromkeys(same))}
    groups = torch.tensor([number[text] for text in same])
    scores = torch.zeros(len(pooled))
    for half in (0, 1):
        rows = (fold != half).nonzero()[:, 0]
        image, text = nn.Linear(384, 128), nn.Linear(384, 128)
        parameters = [*image.parameters(), *text.parameters()]
        optimizer = torch.optim.AdamW(parameters, 1e-3, weight_decay=0.2)
        for _ in range(25):
            for part in rows[torch.randperm(len(rows))].split(128):
                spread = 0.5 * pooled.std(0) * torch.randn(len(part), 384)
                left = nn.functional.normalize(image(pooled[part] + spread), dim=-1)
                right = nn.functional.normalize(text(texts[part]), dim=-1)
                equal = (groups[part][:, None] == groups[part]).float()
                logits, target = 14.0 * left @ right.T, equal / equal.sum(1, keepdim=True)
                loss = nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        with torch.no_grad():
            other = fold == half
            scores[other] = nn.functional.cosine_similarity(image(pooled[other]), text(texts[other]))
    return scores


class Seed:
    """What the arms of a seed share: rows, scores, held-out pictures."""

    def __init__(self, pictures: dict, part: str, seed: int):
        self.part, self.seed, self.names = part, seed, pictures["names"]
        rng = random.Random(f"real/{part}/{seed}")
        order = list(range(len(pictures["kinds"])))
        rng.shuffle(order)
        # held out are pictures whose text no training row has
        heldout, rest = order[:HELDOUT], order[HELDOUT:]
        if part == "kinds":
            true = [pictures["kinds"][row] for row in rest]
            wrong = [rng.random() < NOISE for _ in rest]
            others = [rng.choice([name for name in self.names if name != kind]) for kind in true]
            self.texts = [other if bad else kind for kind, other, bad in zip(true, others, wrong, strict=True)]
            read = pictures["names_read"][torch.tensor([self.names.index(text) for text in self.texts])]
            self.wanted = [pictures["kinds"][row] for row in heldout]
        else:
            taken = {pictures["captions"][row] for row in heldout}
            rest = [row for row in rest if pictures["captions"][row] not in taken]
            self.texts = [pictures["captions"][row].lower() for row in rest]
            read = pictures["sentences"][rest]
            self.wanted = [pictures["captions"][row].lower() for row in heldout]
        self.features, self.heldout = pictures["features"][rest].float(), pictures["features"][heldout].float()
        self.scores = cross_fit(pictures["pooled"][rest], read, self.texts, seed)
        # how well the scores tell a wrong kind, where that is known
        self.teacher = auc(self.scores, ~torch.tensor(wrong)) if part == "kinds" else None
        self.choices = [
            [row, *rng.sample([o for o in range(HELDOUT) if o != row], CHOICES - 1)] for row in range(HELDOUT)
        ]

    def run(self, arm: Arm, budget: Budget) -> dict:
        """Trains one arm and measures it."""
        started, student = time.perf_counter(), Student(None, self.seed, tower_width=self.features.shape[-1])
        rows = rows_of(arm, self.features, self.texts, self.scores, self.seed)
        loss = train(student, arm, CAPTION, rows, budget, self.seed)
        student.model.eval()
        found: dict = {"loss": round(loss, 4), "teacher": self.teacher and round(self.teacher, 4)}
        for name, level in (("top", LEVELS - 1), ("lowest", 0)):
            if name == "top" or arm.cut is not None:
                found[name] = self.measure(student, arm, level)
        if arm.cut is not None:
            found["counts"] = torch.bincount(rows.levels, minlength=LEVELS).tolist()
        if self.part == "kinds":
            found["judging"] = self.judge(student, arm)
        return {**found, "seconds": round(time.perf_counter() - started, 1)}

    def measure(self, student: Student, arm: Arm, level: int) -> dict[str, str]:
        """A string of 0 and 1, one for each held-out picture."""
        if self.part == "kinds":
            written = student.write(arm, CAPTION, self.heldout, level)
            return {"kind": "".join("01"[a == b] for a, b in zip(written, self.wanted, strict=True))}
        bits = []
        for row, choices in enumerate(self.choices):
            # which of eight pictures does the text belong to: what the text alone makes likely is the same for all
            sums, _ = log_likelihood(student, arm, self.heldout[choices], [self.wanted[row]] * CHOICES, level)
            bits.append("01"[int(sums.argmax()) == 0])
        return {"picture of eight": "".join(bits)}

    def judge(self, student: Student, arm: Arm) -> dict[str, dict[str, float]]:
        """AUC of true against wrong kinds of the held-out pictures."""
        rng = random.Random(f"real/judging/{self.seed}")
        wrong = [rng.choice([name for name in self.names if name != kind]) for kind in self.wanted]
        texts, features = self.wanted + wrong, torch.cat([self.heldout, self.heldout])
        true = torch.arange(len(texts)) < len(self.wanted)
        own, _ = log_likelihood(student, arm, features, texts, LEVELS - 1)
        others = [
            log_likelihood(student, arm, features.roll(shift * 31, 0), texts, LEVELS - 1)[0] for shift in range(1, 8)
        ]
        prior = torch.stack(others).logsumexp(0)
        found = {"likelihood": own, "likelihood less 1 of other images": own - prior}
        if arm.cut is not None:
            captions = _Captions(texts, features)
            found["mean level"] = judge_by_level(student, arm, captions)
        return {name: {"within": round(auc(values, true), 4)} for name, values in found.items()}


class _Captions:
    def __init__(self, texts: list[str], features: torch.Tensor):
        self.texts, self.features = texts, features


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=tuple(PARTS), default="kinds")
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--arms", nargs="+", default=ARMS)
    parser.add_argument("--rate", type=float, help="peak learning rate (grid)")
    parser.add_argument("--name", default="", help="put behind the arms' names, for the grid of development seeds")
    parser.add_argument("--output", type=Path, default=Path("runs/levels"))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    pictures = torch.load(args.output / "pictures.pt", weights_only=True)
    path = args.output / f"real-{args.part}.jsonl"
    there, budget = finished(path), PARTS[args.part]
    budget = budget if args.rate is None else replace(budget, rate=args.rate)
    for seed in args.seeds:
        left = [name for name in args.arms if (name + args.name, seed) not in there]
        work = Seed(pictures, args.part, seed) if left else None
        for name in left:
            run = {"arm": name + args.name, "seed": seed, **work.run(STAGE_1[name], budget)}
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(run) + "\n")
            shown = {
                level: bits.count("1") / len(bits)
                for level in ("top", "lowest")
                for bits in run.get(level, {}).values()
            }
            print(
                f"real {args.part} seed {seed} {run['arm']}: {shown} {run['teacher']}; {run['seconds']} s", flush=True
            )


if __name__ == "__main__":
    main()
