"""MM-Vet: a judge grades each answer 0.0 to 1.0."""

from collections.abc import Sequence
from typing import Any


def parse_grade(judgement: str) -> float | None:
    """The grade that a judgement begins with; `None` when it is no number from 0 to 1."""
    words = judgement.strip().split(" ")
    try:
        grade = float(words[0].strip())
    except ValueError:
        return None
    return grade if 0.0 <= grade <= 1.0 else None


def mm_vet_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """
    Mean grade in percent.

    Args:
        predictions: stored judgements of the answers, each beginning with a grade.
        references: capabilities that each question needs, such as `"ocr,math"`.

    Returns:
        `score`, `by_capability`, `by_combination` (questions that need exactly these), and `unread`: judgements without
        a grade, which count as 0.

    Raises:
        ValueError: no judgements, or not as many questions.
    """
    if not predictions or len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} judgements for {len(references)} questions: as many are needed.")
    read = [parse_grade(judgement) for judgement in predictions]
    grades = [grade or 0.0 for grade in read]
    single: dict[str, list[float]] = {}
    exact: dict[str, list[float]] = {}
    for grade, capabilities in zip(grades, references, strict=True):
        needed = sorted({name.strip() for name in capabilities.split(",")})
        exact.setdefault(",".join(needed), []).append(grade)
        for name in needed:
            single.setdefault(name, []).append(grade)
    return {
        "score": 100 * sum(grades) / len(grades),
        "by_capability": _means(single),
        "by_combination": _means(exact),
        "unread": sum(grade is None for grade in read),
    }


def _means(groups: dict[str, list[float]]) -> dict[str, float]:
    return {name: 100 * sum(group) / len(group) for name, group in sorted(groups.items())}
