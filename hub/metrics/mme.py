"""MME: pairs of yes-or-no questions about one image."""

from collections.abc import Sequence
from typing import Any


PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def read_answer(text: str) -> str:
    """`"yes"`, `"no"` or `"other"`: what an answer says, from its first four letters when it is longer."""
    text = text.lower().strip().replace(".", "")
    if text in ("yes", "no"):
        return text
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text, "other")
    return next((word for word in ("yes", "no") if word in text[:4]), "other")


def mme_scores(
    predictions: Sequence[str], references: Sequence[str], question_ids: Sequence[str], categories: Sequence[str]
) -> dict[str, Any]:
    """
    The benchmark's points. A task's points are accuracy + accuracy+ in percent (0..200), where accuracy+ is the share
    of images both of whose questions are answered right; perception (0..2000) and cognition (0..800) are sums.

    Args:
        predictions: answers.
        references: "yes" or "no".
        question_ids: the image of each question; two questions share one.
        categories: the task of each question, of `PERCEPTION` or `COGNITION`.

    Returns:
        `perception`, `cognition` (of the tasks that occur), and `by_task`: `accuracy` and `accuracy_plus` (0..1) and
        `score`.

    Raises:
        ValueError: lists of different lengths, an unknown task, or an image without exactly two questions.
    """
    if not predictions or len({len(predictions), len(references), len(question_ids), len(categories)}) != 1:
        raise ValueError(
            f"{len(predictions)} predictions, {len(references)} references, {len(question_ids)} question ids and "
            f"{len(categories)} categories: as many of each are needed."
        )
    images: dict[str, dict[str, list[bool]]] = {}
    for answer, truth, question, category in zip(predictions, references, question_ids, categories, strict=True):
        if category not in PERCEPTION + COGNITION:
            raise ValueError(f"The category {category!r} is none of MME's: {', '.join(PERCEPTION + COGNITION)}.")
        right = read_answer(answer) == truth.lower().strip().replace(".", "")
        images.setdefault(category, {}).setdefault(question, []).append(right)
    by_task = {}
    for category, questions in images.items():
        for question, hits in questions.items():
            if len(hits) != 2:
                raise ValueError(
                    f"Image {question!r} of {category!r} has {len(hits)} question(s): MME asks two about each."
                )
        pairs = list(questions.values())
        accuracy = sum(map(sum, pairs)) / (2 * len(pairs))
        plus = sum(map(all, pairs)) / len(pairs)
        by_task[category] = {"accuracy": accuracy, "accuracy_plus": plus, "score": 100 * (accuracy + plus)}
    return {
        **{
            name: sum(by_task[task]["score"] for task in tasks if task in by_task)
            for name, tasks in (("perception", PERCEPTION), ("cognition", COGNITION))
        },
        "by_task": by_task,
    }
