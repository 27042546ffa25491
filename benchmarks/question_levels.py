"""
A gate with something to say, tried small: stage 2 at a level that says how well the scorer finds the question in the
image, which the language model cannot see; ablation.md.

    python -m aligngpt_playground ablation --seeds 3 --keep-models --output runs/ablation
    python benchmarks/question_levels.py --ablation runs/ablation --seeds 3 --output runs/question-levels

Each row asks one question. Its level is cut from CLIP's similarity of the image and the question, in equal numbers,
at the edges of the training rows; a held-out question is asked at its own level, found in the same way. Beside it: the
paper's gate, the top level alone, and the same levels dealt out at random. All start from one stage 1 a seed.
"""

import argparse
import json
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, load_from_disk

from aligngpt_playground.ablation.rows import silent
from aligngpt_playground.ablation.table import half_width
from aligngpt_playground.evaluate import questions_of, score_answer
from aligngpt_playground.hard_questions import TRAINING_SCENES, hard_questions, popular_objects
from aligngpt_playground.measures import LoadedModel, auc
from aligngpt_playground.questions import QUESTION_TYPES
from aligngpt_playground.scenes import draw_scenes, render
from aligngpt_playground.world import parts_path
from aligngpt_shared.files import write_json
from aligngpt_trainers import AlignGPTInstructConfig, AlignGPTInstructTrainer
from aligngpt_trainers.scoring.scorer import PairScorer, cut_levels
from modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor


ARMS = {"gate": "gate", "top level": "global", "level of the question": "level", "levels at random": "level"}
GROUPS = {
    "all types, mean": QUESTION_TYPES,
    "yes/no": ("yesno",),
    "absent objects (POPE's three)": ("absent, random", "absent, popular", "absent, adversarial"),
    "which is left of; two hops: kind": ("which is left of", "two hops: kind"),
}
"""Rows of the table; the other harder questions have forms that no arm answers."""
TURNS, BATCH = 3, 32
"""Questions that are taken of each conversation; rows of a step."""


def training_questions(world: Path, seed: int) -> list[tuple]:
    """(image, question) of single-turn rows: `TURNS` questions of each conversation."""
    rng = random.Random(f"questions/{seed}")
    rows = load_from_disk(str(world / "data" / "conversations"))["train"]
    asked = []
    for row in rows:
        known = questions_of(row)
        asked += [(row["images"][0], question) for question in rng.sample(known, min(TURNS, len(known)))]
    return asked


def heldout_questions(world: Path, images: int) -> list[tuple]:
    """(image, question) of the world's own held-out conversations, then of the harder set on other images."""
    rows = load_from_disk(str(world / "heldout" / "conversations"))["heldout"]
    asked = [(row["images"][0], question) for row in rows for question in questions_of(row)]
    rng = random.Random("hard/0")
    popular = popular_objects(list(draw_scenes(TRAINING_SCENES, 0, "train")))
    for scene in draw_scenes(images, 0, "heldout"):
        image = render(scene, rng.random())
        asked += [(image, question) for question in hard_questions(scene, rng, popular)]
    return asked


def similarities(asked: list[tuple]) -> np.ndarray:
    """CLIP's cosine similarity of each image and question."""
    scorer, values = PairScorer(str(parts_path("clip")), device="cpu"), []
    for start in range(0, len(asked), 256):
        images, questions = zip(*asked[start : start + 256], strict=True)
        prepared = scorer.preprocess(list(images), [question.question for question in questions])
        values += scorer.score(*prepared[:2]).tolist()
    return np.asarray(values)


def to_rows(asked: list[tuple], levels: np.ndarray) -> Dataset:
    def messages(question) -> list[dict]:
        content = [{"type": "image", "text": None}, {"type": "text", "text": question.question}]
        answer = [{"type": "text", "text": question.answer}]
        return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]

    return Dataset.from_list(
        [
            {"images": [image], "messages": messages(question), "align_level": int(level)}
            for (image, question), level in zip(asked, levels, strict=True)
        ]
    )


def run_arm(arm: str, seed: int, stage1: Path, train: tuple, heldout: tuple, output: Path) -> dict:
    """Trains one arm; the share of right answers of each type of question."""
    (asked, levels), (questions, own) = train, heldout
    if arm == "levels at random":
        rng = np.random.default_rng(seed)
        levels, own = rng.permutation(levels), rng.permutation(own)
    model = AlignGPTForConditionalGeneration.from_pretrained(stage1, dtype="float32")
    processor = AlignGPTProcessor.from_pretrained(stage1)
    config = AlignGPTInstructConfig(
        str(output / "unused"), max_steps=len(asked) // BATCH, per_device_train_batch_size=BATCH, learning_rate=1e-3,
        gradient_accumulation_steps=1, align_mode=ARMS[arm], seed=seed, max_length=256, use_cpu=True, overwrite=True,
        save_strategy="no", logging_strategy="no", report_to="none", gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    with silent():
        trainer = AlignGPTInstructTrainer(model, config, to_rows(asked, levels), processing_class=processor)
        trainer.train()
    by_level = ARMS[arm] == "level"
    answers = answer(LoadedModel(trainer.model, processor), questions, own if by_level else None)
    hits = defaultdict(list)
    for (_, question), given in zip(questions, answers, strict=True):
        hits[question.type].append(score_answer(given, question.answer))
    return {kind: float(np.mean(right)) for kind, right in hits.items()}


def answer(model: LoadedModel, questions: list[tuple], levels: np.ndarray | None) -> list[str]:
    chats = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.question}]}]
        for _, question in questions
    ]
    each = None if levels is None else [int(level) for level in levels]
    return model._generate([image for image, _ in questions], model._render(chats), each)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ablation", type=Path, required=True, help="folder of an ablation with kept models")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=200, help="of the harder set (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/question-levels"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[dict]] = {arm: [] for arm in ARMS}
    for seed in range(args.seeds):
        folder = args.ablation / f"seed-{seed}"
        paths = {arm: args.output / f"{seed}-{arm.replace(' ', '-')}.json" for arm in ARMS}
        if not all(path.is_file() for path in paths.values()):
            asked, questions = (
                training_questions(folder / "world", seed),
                heldout_questions(folder / "world", args.images),
            )
            scores, own = similarities(asked), similarities(questions)
            levels, edges, _ = cut_levels(scores, 8, "quantile")
            train, heldout = (asked, levels), (questions, cut_levels(own, method="edges", edges=edges)[0])
            known = [
                (value, q.answer) for value, (_, q) in zip(own, questions, strict=True) if q.answer in ("yes", "no")
            ]
            told = auc([v for v, a in known if a == "yes"], [v for v, a in known if a == "no"])
            print(f"seed {seed}: CLIP's similarity tells yes from no with AUC {told:.3f}", flush=True)
            for arm, path in paths.items():
                if not path.is_file():
                    stage1 = folder / "pretrain" / "levels-8"
                    write_json(path, run_arm(arm, seed, stage1, train, heldout, args.output))
        for arm, path in paths.items():
            runs[arm].append(json.loads(path.read_text()))
    print("| questions | " + " | ".join(ARMS) + " | level of the question, beside the gate |")
    print("|---|" + "---|" * (len(ARMS) + 1))
    for name, kinds in GROUPS.items():
        shares = {arm: [np.mean([run[kind] for kind in kinds]) for run in runs[arm]] for arm in ARMS}
        paired = np.subtract(shares["level of the question"], shares["gate"])
        cells = " | ".join(f"{np.mean(shares[arm]):.3f}" for arm in ARMS)
        print(f"| {name} | {cells} | {np.mean(paired):+.3f} ± {half_width(paired.tolist()):.3f} |")


if __name__ == "__main__":
    main()
