"""POPE: yes-or-no questions about objects that are there or not."""

from collections.abc import Sequence
from typing import Any


SPLITS = ("random", "popular", "adversarial")


def _rates(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Scores of (answer, truth) pairs in lower case."""
    number = len(pairs)
    true_yes = sum(answer == truth == "yes" for answer, truth in pairs)
    false_yes = sum(answer == "yes" != truth for answer, truth in pairs)
    # an answer that is neither yes nor no is wrong and counts as no miss, as in the benchmark's own script
    false_no = sum(answer == "no" != truth for answer, truth in pairs)
    precision = true_yes / (true_yes + false_yes) if true_yes + false_yes else 0.0
    recall = true_yes / (true_yes + false_no) if true_yes + false_no else 0.0
    return {
        "accuracy": sum(answer == truth for answer, truth in pairs) / number,
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "yes_ratio": (true_yes + false_yes) / number,
    }


def pope_scores(
    predictions: Sequence[str], references: Sequence[str], splits: Sequence[str] | None = None
) -> dict[str, Any]:
    """
    Accuracy, precision, recall, F1 and the share of "yes" among the answers, each 0..1.

    Args:
        predictions: answers; only "yes" and "no" (in any case, with spaces around) can be right.
        references: "yes" or "no".
        splits: the split of each question (`"random"`, `"popular"`, `"adversarial"`).

    Returns:
        The scores over all questions; with `splits` also `by_split`, each split's scores, and `mean_f1`, the mean of
        their F1: the figure of LLaVA-1.5 and of the paper.

    Raises:
        ValueError: no predictions, not as many references or splits, or a reference that is neither.
    """
    numbers = {len(predictions), len(references), len(predictions if splits is None else splits)}
    if not predictions or len(numbers) != 1:
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references: as many are needed.")
    pairs = []
    for index, (answer, truth) in enumerate(zip(predictions, references, strict=True)):
        truth = truth.lower().strip()
        if truth not in ("yes", "no"):
            raise ValueError(f"Reference {index} is {truth!r}: it must be yes or no.")
        pairs.append((answer.lower().strip(), truth))
    scores: dict[str, Any] = _rates(pairs)
    if splits is not None:
        names = [*(name for name in SPLITS if name in splits), *sorted(set(splits) - set(SPLITS))]
        by_split = {
            name: _rates([pair for pair, split in zip(pairs, splits, strict=True) if split == name]) for name in names
        }
        scores["mean_f1"] = sum(rates["f1"] for rates in by_split.values()) / len(by_split)
        scores["by_split"] = by_split
    return scores
