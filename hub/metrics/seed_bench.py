"""SEED-Bench: multiple choice about images and videos."""

from collections.abc import Sequence
from typing import Any


def seed_bench_scores(
    predictions: Sequence[str],
    references: Sequence[str],
    data_types: Sequence[str] | None = None,
    question_types: Sequence[str | int] | None = None,
) -> dict[str, Any]:
    """
    Share of right choices, 0..1. The first letter of an answer is what it says, in any case.

    Args:
        predictions: answers.
        references: letters.
        data_types: `"image"` or `"video"` of each question.
        question_types: type of each question.

    Returns:
        `accuracy`, and where given `by_data_type` (the paper's figure is that of `"image"`) and `by_question_type`.

    Raises:
        ValueError: no predictions, or lists of other lengths.
    """
    lists = [references, *(each for each in (data_types, question_types) if each is not None)]
    if not predictions or any(len(each) != len(predictions) for each in lists):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references: as many are needed.")
    hits = [
        answer.strip()[:1].lower() == letter.strip().lower()
        for answer, letter in zip(predictions, references, strict=True)
    ]
    scores: dict[str, Any] = {"accuracy": sum(hits) / len(hits)}
    for name, types in (("by_data_type", data_types), ("by_question_type", question_types)):
        if types is not None:
            groups: dict[str, list[bool]] = {}
            for hit, kind in zip(hits, types, strict=True):
                groups.setdefault(str(kind), []).append(hit)
            scores[name] = {kind: sum(group) / len(group) for kind, group in sorted(groups.items())}
    return scores
