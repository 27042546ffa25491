"""How well a saved model describes held-out images (after stage 1) and answers questions on them (after stage 2)."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from .captions import exact_caption
from .questions import QUESTION_TYPES, Question
from .scenes import BACKGROUNDS, Scene
from .sprites import OBJECTS, plural


CAPTION_MEASURES = ("main object", "all objects", "background")
"""main object: the first one in reading order is named. all objects: these and no others are named. background: this
one and no other is named."""
OVERALL = "overall"
_WORD_TO_OBJECT = {word: name for name in OBJECTS for word in (name, plural(name))}


@dataclass(frozen=True)
class Accuracy:
    """One row of a table.

    Args:
        name: a caption measure or question type.
        number: images or questions.
        accuracy: share that is right.
        majority: share that the most frequent training answer gets right.
        majority_answer: that answer; None where it differs between the rows that are summed up.
        at_chance: whether `accuracy` is not above `majority`, or a better guess, by more than two standard errors.
        before: share that the model got right before the stage that is measured; None where nobody asked.
    """

    name: str
    number: int
    accuracy: float
    majority: float
    majority_answer: str | None
    at_chance: bool
    before: float | None = None


def accuracy_of(name: str, hits: Sequence[bool], majority_hits: Sequence[bool], answer: str | None = None) -> Accuracy:
    """Summarise what was right, row by row, beside what the majority answer gets right."""
    number = len(hits)
    if number == 0 or len(majority_hits) != number:
        raise ValueError(
            f"{name}: {number} results and {len(majority_hits)} of the majority answer; there must be as many"
        )
    accuracy, majority = sum(hits) / number, sum(majority_hits) / number
    return Accuracy(name, number, accuracy, majority, answer, _within_noise(accuracy, majority, number))


def _within_noise(accuracy: float, baseline: float, number: int) -> bool:
    """Whether `accuracy` is not above `baseline` by more than two standard errors."""
    spread = (accuracy * (1 - accuracy) + baseline * (1 - baseline)) / number
    return accuracy - baseline <= 2 * spread**0.5


# ---- captions ----


def objects_named(text: str) -> list[str]:
    """The objects that a text names, in its order, without repetitions; plurals count."""
    found = (_WORD_TO_OBJECT.get(word) for word in re.findall(r"[a-z]+", text.lower()))
    return list(dict.fromkeys(name for name in found if name))


def backgrounds_named(text: str) -> list[str]:
    """The backgrounds that a text names (`"in the snow"` -> `"snow"`)."""
    words = " ".join(re.findall(r"[a-z]+", text.lower()))
    return [name for name, phrase in BACKGROUNDS.items() if re.search(rf"\b{phrase}\b", words)]


def score_caption(text: str, scene: Scene) -> dict[str, bool]:
    """Which of `CAPTION_MEASURES` a caption gets right."""
    named = objects_named(text)
    return {
        "main object": scene.main_object in named,
        "all objects": set(named) == set(scene.names),
        "background": backgrounds_named(text) == [scene.background],
    }


def caption_table(captions: Sequence[str], scenes: Sequence[Scene], training: Sequence[Scene]) -> list[Accuracy]:
    """Accuracy of captions by measure, beside the best single answer learned from training scenes."""
    truths = {
        "main object": lambda scene: scene.main_object,
        "all objects": lambda scene: frozenset(scene.names),
        "background": lambda scene: scene.background,
    }
    scored = [score_caption(text, scene) for text, scene in zip(captions, scenes, strict=True)]
    rows = []
    for measure, truth in truths.items():
        answer = _most_common(truth(scene) for scene in training)
        shown = " and ".join(sorted(answer)) if isinstance(answer, frozenset) else answer
        right = [truth(scene) == answer for scene in scenes]
        rows.append(accuracy_of(measure, [score[measure] for score in scored], right, shown))
    return rows


# ---- questions ----


def score_answer(given: str, expected: str) -> bool:
    """Whether an answer is the expected one, up to case, spaces and a final full stop."""
    return _plain(given) == _plain(expected)


def majority_answers(questions: Sequence[Question]) -> dict[str, str]:
    """Question type -> its most frequent answer (of equally frequent ones the first in the alphabet)."""
    return {
        kind: _most_common(question.answer for question in questions if question.type == kind)
        for kind in dict.fromkeys(question.type for question in questions)
    }


def question_table(
    answers: Sequence[str],
    questions: Sequence[Question],
    training: Sequence[Question],
    types: Sequence[str] = QUESTION_TYPES,
) -> tuple[list[Accuracy], Accuracy]:
    """Accuracy by question type, and of all questions together.

    Args:
        answers: the model's, one for each question.
        questions: held-out questions.
        training: questions that the majority answer of each type is learned from.
        types: of questions, in the table's order.
    """
    majority = majority_answers(training)
    hits: dict[str, list[bool]] = {}
    baseline: dict[str, list[bool]] = {}
    for given, question in zip(answers, questions, strict=True):
        hits.setdefault(question.type, []).append(score_answer(given, question.answer))
        baseline.setdefault(question.type, []).append(majority.get(question.type) == question.answer)
    kinds = [kind for kind in types if kind in hits]
    rows = [accuracy_of(kind, hits[kind], baseline[kind], majority.get(kind)) for kind in kinds]
    every = accuracy_of(
        OVERALL, [hit for kind in kinds for hit in hits[kind]], [b for kind in kinds for b in baseline[kind]]
    )
    return rows, every


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).removesuffix(".").strip()


def _most_common(values) -> Any:
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], sorted(value) if isinstance(value, frozenset) else value))


# ---- running a model ----


class SavedModel:
    """A model folder, loaded as transformers loads it, that captions images and answers questions in batches.

    Args:
        folder: what `aligngpt pretrain` or `aligngpt instruct` wrote.
        batch_size: images at once.

    Raises:
        ValueError: the folder holds no model.
    """

    def __init__(self, folder: str | Path, batch_size: int = 128):
        from transformers import AutoModelForImageTextToText, AutoProcessor

        if not (Path(folder) / "config.json").is_file():
            raise ValueError(f"{folder} holds no model (no config.json); give a folder that a stage has written")
        self.processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        self.model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype="float32").eval()
        self.batch_size = batch_size

    @property
    def stage(self) -> str | None:
        """The last stage that the model went through."""
        return self.model.config.training_stage

    @property
    def num_align_levels(self) -> int:
        """Number of alignment levels."""
        return self.model.config.num_align_levels

    def caption(self, images: Sequence[Image.Image], align_level: int | Sequence[int] | None = None) -> list[str]:
        """Caption images in stage 1's format.

        Args:
            images: what to describe.
            align_level: 0-based level, or one for each image; None for the model's default.
        """
        from modeling_aligngpt.chat_templates import CHAT_TEMPLATES

        prompt = [{"role": "user", "content": [{"type": "image"}]}]
        texts = self._render([prompt], chat_template=CHAT_TEMPLATES["plain"]) * len(images)
        levels = [align_level] * len(images) if align_level is None or isinstance(align_level, int) else align_level
        return [text.split("\n")[0].strip() for text in self._generate(images, texts, levels)[0]]

    def answer(
        self, images: Sequence[Image.Image], questions: Sequence[str], align_level: int | None = None
    ) -> tuple[list[str], list[list[float]]]:
        """Answer one question about each image, as the model does by itself or at a level.

        Returns:
            The answers, and for each the gate's weights of levels 0..N-2.
        """
        content = [{"type": "image"}]
        chats = [[{"role": "user", "content": [*content, {"type": "text", "text": text}]}] for text in questions]
        return self._generate(images, self._render(chats), [align_level] * len(questions))

    def _render(self, chats: list, **options: Any) -> list[str]:
        return self.processor.apply_chat_template(chats, tokenize=False, add_generation_prompt=True, **options)

    def _generate(
        self, images: Sequence[Image.Image], texts: list[str], levels: Sequence[int | None] | None = None
    ) -> tuple[list[str], list[list[float]]]:
        """Answers and the shares of levels 0..N-2 of prompts with one image each."""
        import torch

        levels = levels or [None] * len(texts)
        if not len(images) == len(texts) == len(levels):
            numbers = f"{len(images)} images, {len(texts)} prompts, {len(levels)} levels"
            raise ValueError(f"{numbers}; there must be as many of each")
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))  # rows of a batch of like length
        answers, gates = [""] * len(texts), [[] for _ in texts]
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            batch = self.processor(
                images=[images[row] for row in rows],
                text=[texts[row] for row in rows],
                padding=True,
                padding_side="left",
                return_tensors="pt",
            )
            if levels[rows[0]] is not None:
                batch["align_level"] = torch.tensor([levels[row] for row in rows])
            with torch.inference_mode():
                output = self.model.generate(**batch, max_new_tokens=32, do_sample=False, return_dict_in_generate=True)
            ids = output.sequences[:, batch["input_ids"].shape[1] :]
            written = self.processor.batch_decode(ids, skip_special_tokens=True)
            for row, text, shares in zip(rows, written, output.align_weights.tolist(), strict=True):
                answers[row], gates[row] = text.strip(), shares[:-1]
        return answers, gates


# ---- a saved model on the folders that `python -m aligngpt_playground make` writes ----


def evaluate_captions(model: str | Path, data: str | Path, folder: str | Path, examples: int = 6) -> dict[str, Any]:
    """Captions of the held-out images of a folder of pairs, at the lowest and at the highest level.

    Args:
        model: folder of a stage-1 model.
        data: folder of pairs.
        folder: folder that gets the example images.
        examples: images that are captioned at every level.

    Returns:
        `number`, `rows` (`Accuracy` fields at the highest level, the model's default), `by_level` and `examples`.
    """
    from datasets import load_from_disk

    saved, splits = SavedModel(model), load_from_disk(str(data))
    images, scenes = splits["heldout"]["image"][:], scenes_of(splits["heldout"])
    training, top = scenes_of(splits["train"]), saved.num_align_levels - 1
    by_level = []
    for level in (0, top):
        captions = saved.caption(images, align_level=level)
        words = sum(len(text.split()) for text in captions) / len(captions)
        table = [asdict(row) for row in caption_table(captions, scenes, training)]
        by_level.append({"level": level, "words": words, "rows": table})
    shown, levels = images[:examples], list(range(top + 1))
    texts = saved.caption([image for image in shown for _ in levels], align_level=levels * len(shown))
    listed = [
        {
            "image": save_image(image, folder, f"caption-{index}"),
            "shows": exact_caption(scenes[index]),
            "by_level": texts[index * len(levels) : (index + 1) * len(levels)],
        }
        for index, image in enumerate(shown)
    ]
    return {"number": len(images), "rows": by_level[-1]["rows"], "by_level": by_level, "examples": listed}


def evaluate_questions(
    model: str | Path, data: str | Path, folder: str | Path, before: str | Path | None = None
) -> dict[str, Any]:
    """Answers to the held-out questions of a folder of conversations, each asked alone, and what the gate did.

    Args:
        model: folder of a stage-2 model.
        data: folder of conversations.
        folder: folder that gets the example images.
        before: folder of the stage-1 model that stage 2 began with; it is asked the same questions, at its top level.

    Returns:
        `questions` (`Accuracy` fields by type and `overall`; `examples`: the first question of each type; `notes`) and
        `gate` (mean weights of the local levels, over all questions and by type; `top`: the largest that is listed).
    """
    from datasets import load_from_disk

    saved, splits = SavedModel(model), load_from_disk(str(data))
    rows = list(splits["heldout"])
    asked = [(row, question) for row in rows for question in questions_of(row)]
    questions = [question for _, question in asked]
    images = [row["images"][0] for row, _ in asked]
    answers, weights = saved.answer(images, [question.question for question in questions])
    training = [question for row in splits["train"].remove_columns("images") for question in questions_of(row)]
    table, overall = question_table(answers, questions, training)
    if before is not None:
        earlier, _ = SavedModel(before).answer(images, [question.question for question in questions])
        shares = {row.name: row.accuracy for row in _rows(question_table(earlier, questions, training))}
        table = [replace(row, before=shares[row.name]) for row in table]
        overall = replace(overall, before=shares[OVERALL])
    notes, lucky = [], [_lucky_place(row) for row, question in asked if question.type == "where"]
    if lucky:
        # more than the majority answer gets, and no sign that the question was understood
        share = sum(lucky) / len(lucky)
        notes = [f"where: naming the place of just any object in the picture gets {share:.3f} right."]
        table = [
            replace(row, at_chance=_within_noise(row.accuracy, share, row.number)) if row.name == "where" else row
            for row in table
        ]
    examples, means, shown = [], [], set()
    for kind in (row.name for row in table):
        those = [index for index, question in enumerate(questions) if question.type == kind]
        means.append({"type": kind, "weights": _mean([weights[index] for index in those])})
        # the first question of its type on an image that no other type has shown yet
        at = next((index for index in those if id(asked[index][0]) not in shown), those[0])
        row, question = asked[at]
        shown.add(id(row))
        examples.append(
            {
                "image": save_image(row["images"][0], folder, f"question-{kind}"),
                "shows": exact_caption(Scene.from_json(row["scene"])),
                "type": kind,
                "question": question.question,
                "answer": answers[at],
                "expected": question.answer,
                "right": score_answer(answers[at], question.answer),
                "weights": [round(weight, 4) for weight in weights[at]],
            }
        )
    top = max(weight for entry in [*means, *examples] for weight in entry["weights"])
    listed = [asdict(row) for row in table]
    return {
        "questions": {"rows": listed, "overall": asdict(overall), "examples": examples, "notes": notes},
        "gate": {"mean": _mean(weights), "by_type": means, "top": top},
    }


def _rows(table: tuple[list[Accuracy], Accuracy]) -> list[Accuracy]:
    return [*table[0], table[1]]


def _lucky_place(row: dict[str, Any]) -> float:
    """How often naming the place of just any object answers "where is the cat?"."""
    return 1 / len(Scene.from_json(row["scene"]).objects)


def questions_of(row: dict[str, Any]) -> list[Question]:
    """The questions of a conversation row, each with its answer and type."""
    texts = ["".join(part["text"] or "" for part in message["content"]) for message in row["messages"]]
    return [Question(*fields) for fields in zip(row["types"], texts[::2], texts[1::2], strict=True)]


def save_image(image: Image.Image, folder: str | Path, name: str) -> str:
    """Save an image as PNG; returns `folder/name.png`."""
    path = Path(folder) / f"{name}.png"
    image.save(path)
    return path.as_posix()


def scenes_of(rows: Any) -> list[Scene]:
    return [Scene.from_json(text) for text in rows["scene"]]


def _mean(rows: Sequence[Sequence[float]]) -> list[float]:
    return [round(sum(column) / len(rows), 4) for column in zip(*rows, strict=True)]


def format_table(title: str, rows: Sequence[Accuracy]) -> str:
    """A table for the terminal; rows that are not above the majority answer are marked."""
    asked_before = any(row.before is not None for row in rows)
    head = f"{'before':>8}" if asked_before else ""
    lines = [f"{title:<34}{'right':>7}{head}{'majority answer':>29}{'number':>8}"]
    for row in rows:
        answer = f' ("{row.majority_answer}")' if row.majority_answer else ""
        if len(answer) > 22:
            answer = answer[:18] + '..")'
        majority = f"{row.majority:.3f}{answer:<22}"
        mark = "  at chance" if row.at_chance else ""
        earlier = (f"{'' if row.before is None else f'{row.before:.3f}':>8}") if asked_before else ""
        lines.append(f"  {row.name:<32}{row.accuracy:>7.3f}{earlier}  {majority:<27}{row.number:>8}{mark}")
    return "\n".join(lines)
