"""Scores of two scorers -> one: the mean of both, each standardised."""

from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from ..data.load import RowReport


EARLIER, OWN = "earlier", "own"


def standardized_mean(
    earlier: np.ndarray, own: np.ndarray, facts: dict[str, dict[str, float]] | None = None
) -> tuple[np.ndarray, dict[str, dict[str, float]]]:
    """The mean of two scores of the same rows, each less its mean and divided by its standard deviation.

    Args:
        earlier, own: [rows] float.
        facts: `mean` and `std` of both, of other rows that these shall be compared with; by default these rows' own.

    Returns:
        ([rows] float32, `facts`: `mean` and `std` of `earlier` and of `own`)

    Raises:
        ValueError: all scores of one scorer are equal.
    """
    scores = {EARLIER: np.asarray(earlier, np.float64), OWN: np.asarray(own, np.float64)}
    if facts is None:
        facts = {name: {"mean": float(each.mean()), "std": float(each.std())} for name, each in scores.items()}
    for name, fact in facts.items():
        if not fact["std"] > 0:
            raise ValueError(f"add_score: all {name} scores are {fact['mean']}, so they cannot be added to others.")
    total = sum((each - facts[name]["mean"]) / facts[name]["std"] for name, each in scores.items())
    return (total / len(scores)).astype(np.float32), facts


def refuse_without_score(rows: Dataset, report: RowReport) -> None:
    """Raises where the rows have no score to add to, or one with an image lacks it."""
    if "clip_score" not in rows.column_names:
        raise ValueError(
            "add_score: the rows have no clip_score. Score them by the other scorer first, and give its output as "
            "the dataset."
        )
    seen = 0
    for batch in rows.select_columns(["images", "clip_score"]).with_format("arrow").iter(batch_size=10_000):
        images = pc.list_value_length(batch["images"]).to_numpy(zero_copy_only=False)
        scores = batch["clip_score"].to_numpy(zero_copy_only=False)
        lacking = np.flatnonzero((images > 0) & ~np.isfinite(scores))
        if len(lacking):
            position = report.kept[seen + int(lacking[0])]
            raise ValueError(f"row {position}: add_score needs its clip_score, which it lacks. Score the rows anew.")
        seen += len(scores)


def earlier_scores(rows: Dataset) -> np.ndarray:
    """[rows] the scores that the rows came with, NaN where a row has none."""
    return rows.select_columns(["clip_score"]).with_format("arrow")[:]["clip_score"].to_numpy()


def facts_of(record: dict[str, Any] | None, add_score: bool) -> dict[str, dict[str, float]] | None:
    """How the run that made the edges standardised its scores.

    Args:
        record: of that run; None where edges are numbers, or none.
        add_score: of this run.

    Raises:
        ValueError: only one of the two added scores, so that the edges say nothing about the other's; or its record
            cannot be read.
    """
    if record is None:
        return None
    facts = record.get("added")
    if (facts is not None) != add_score:
        raise ValueError(
            f"edges: they were cut {'from' if facts else 'without'} added scores, so add_score must be "
            f"{'true' if facts else 'false'} here as well."
        )
    if facts is None:
        return None
    try:
        return {name: {key: float(facts[name][key]) for key in ("mean", "std")} for name in (EARLIER, OWN)}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"edges: the earlier run's `added` cannot be read ({type(error).__name__}: {error})."
        ) from error
