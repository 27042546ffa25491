"""LLaVA-Bench (in the wild): a judge gives the reference answer and the model's answer 1 to 10 points each."""

import re
from collections.abc import Sequence
from typing import Any


_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def parse_pair(judgement: str) -> tuple[float, float] | None:
    """The two scores (reference, model) in the first line of a judgement; `None` when it does not hold two."""
    first_line = judgement.strip().split("\n")[0].replace(",", " ").replace(";", " ")
    numbers = _NUMBER.findall(first_line)
    return (float(numbers[0]), float(numbers[1])) if len(numbers) >= 2 else None


def llava_bench_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """
    Points of the model in percent of the reference answers' points.

    Args:
        predictions: stored judgements of the answers, whose first line holds two scores.
        references: category of each question: `"conv"`, `"detail"`, `"complex"`.

    Returns:
        `score`, `by_category`, and `unread`: judgements without two scores, which are left out.

    Raises:
        ValueError: no judgements, not as many categories, or none that can be read.
    """
    if not predictions or len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} judgements for {len(references)} questions: as many are needed.")
    pairs: dict[str, list[tuple[float, float]]] = {}
    unread = 0
    for judgement, category in zip(predictions, references, strict=True):
        pair = parse_pair(judgement)
        if pair is None:
            unread += 1
        else:
            pairs.setdefault(category, []).append(pair)
    every = [pair for group in pairs.values() for pair in group]
    if not every:
        raise ValueError(f"None of {unread} judgements begins with two scores: check the judge's answers.")
    by_category = {category: _percent(group) for category, group in sorted(pairs.items())}
    return {"score": _percent(every), "by_category": by_category, "unread": unread}


def _percent(pairs: Sequence[tuple[float, float]]) -> float:
    reference, model = (round(sum(column) / len(pairs), 3) for column in zip(*pairs, strict=True))
    return round(model / reference * 100, 1) if reference else 0.0
