"""Look before you train: a sheet of pairs of each level, and whether length explains the levels."""

import logging
import math
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Value
from PIL import ImageOps

from modeling_aligngpt.images_aligngpt import shortened

from ..data.conversations import caption_of
from ..data.load import load_image
from .levels import mean_of_levels


logger = logging.getLogger(__name__)

PAIRS = 12
"""Pairs of each level on the sheet."""
SIDE = 160
TELLING = 0.2
"""A rank correlation of length (or source) and score beyond this is worth a word."""
SOURCES = ("source", "dataset")
"""Columns that say where a row is from; the first that is there counts."""
MOST_SOURCES = 50


def draw_sheet(rows: Dataset, levels: np.ndarray, title: str, path: Path):
    """Writes a PNG with up to `PAIRS` pairs of every level, the best aligned on top, drawn at random (the same ones
    each time).

    Args:
        rows: `images` and `messages`.
        levels: [rows], -1 where a row has none.
        title: of the image.
        path: where to.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("matplotlib is not installed, so no %s: `pip install matplotlib`.", path.name)
        return
    number, random = int(levels.max()) + 1, np.random.default_rng(0)
    figure = Figure(figsize=(1.35 * PAIRS + 0.6, 1.95 * number + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    grid = figure.subplots(number, PAIRS, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for level in range(number):
        members = np.flatnonzero(levels == level)
        line = grid[number - 1 - level]
        line[0].text(-0.12, 0.5, f"level {level}", transform=line[0].transAxes, rotation=90, ha="right", va="center")
        for axes, row in zip(line, random.permutation(members)[:PAIRS].tolist(), strict=False):
            shown = rows[row : row + 1]
            images, text = shown["images"][0], caption_of(shown["messages"][0])
            axes.imshow(ImageOps.pad(load_image(images[0]), (SIDE, SIDE), color="white"))
            # `$` would begin a formula
            lines = textwrap.wrap(text.replace("$", r"\$"), 26)[:4]
            axes.text(0.5, -0.05, "\n".join(lines), transform=axes.transAxes, fontsize=6, ha="center", va="top")
    figure.savefig(path, dpi=110, format="png")


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's, ties at their mean rank; 0 where one of the two does not vary."""

    left, right = _ranks(first), _ranks(second)
    left, right = left - left.mean(), right - right.mean()
    spread = np.sqrt((left @ left) * (right @ right))
    return float(left @ right / spread) if spread else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]


def sources_and_scores(rows: Dataset, scores: np.ndarray, levels: np.ndarray) -> dict[str, Any] | None:
    """
    The mix of sources by level: `column`, `counts` (of each source the pairs of each level) and `rank_correlation` (the
    correlation ratio of the ranks of scores, 0 to 1: how much of them the sources explain beyond chance). None where no
    column says the source, or it has one value or more than `MOST_SOURCES`.

    Args:
        rows: maybe with one of the columns `SOURCES`.
        scores: [rows].
        levels: [rows], -1 where a row has none, which is left out.
    """
    column = next((name for name in SOURCES if name in rows.column_names), None)
    if column is None or not isinstance(rows.features[column], Value) or not (levels >= 0).any():
        return None
    good = levels >= 0
    names, places = np.unique(np.array(list(map(str, rows[column][:])))[good], return_inverse=True)
    if not 1 < len(names) <= MOST_SOURCES:
        return None
    ranks = _ranks(scores[good])
    sizes = np.bincount(places)
    means = np.bincount(places, ranks) / sizes
    between, whole = sizes @ (means - ranks.mean()) ** 2, ((ranks - ranks.mean()) ** 2).sum()
    # less what so many sources would explain by chance
    left = (whole - between) / max(1, len(ranks) - len(names))
    share = 1 - left * (len(ranks) - 1) / whole if whole else 0.0
    number = int(levels.max()) + 1
    counts = {
        str(name): np.bincount(levels[good][places == place], minlength=number).tolist()
        for place, name in enumerate(names)
    }
    return {
        "column": column,
        "rank_correlation": round(math.sqrt(max(0.0, share)), 4),
        "counts": counts,
    }


def describe_sources(sources: dict[str, Any] | None) -> list[str]:
    """The mix as lines, a source each, and a sentence where the levels tell the source, too."""
    if sources is None:
        return []
    totals = np.array(list(sources["counts"].values())).sum(0)
    lines = [f"Share of each {sources['column']} in the pairs of each level, from level 0 to the top:"]
    for name, counts in sources["counts"].items():
        shares = (f"{count / total:>4.0%}" if total else "   -" for count, total in zip(counts, totals, strict=True))
        lines.append(f"  {' '.join(shares)}  {shortened(name)}")
    if (found := sources["rank_correlation"]) >= TELLING:
        lines.append(f"Scores go with the source (rank correlation {found:.2f}): levels will stand for it, too.")
    return lines


def lengths_and_scores(rows: Dataset, scores: np.ndarray, levels: np.ndarray) -> dict[str, Any]:
    """How far the length of texts goes with their scores: `rank_correlation`, and `mean_words` of each level.

    Args:
        rows: with `messages`.
        scores: [rows].
        levels: [rows], -1 where a row has none, which is left out.
    """
    words = np.empty(len(rows), np.int32)
    place = 0
    for batch in rows.select_columns(["messages"]).iter(batch_size=1000):
        for messages in batch["messages"]:
            words[place], place = len(caption_of(messages).split()), place + 1
    good = levels >= 0
    means = mean_of_levels(words.astype(np.float32), levels, int(levels.max()) + 1)
    return {
        "rank_correlation": round(rank_correlation(words[good], scores[good]), 4),
        "mean_words": [None if mean is None else round(mean, 2) for mean in means],
    }


def word_about_length(length: dict[str, Any]) -> str | None:
    """A sentence where the levels tell the length of texts, too."""
    found, means = length["rank_correlation"], [mean for mean in length["mean_words"] if mean is not None]
    if abs(found) < TELLING:
        return None
    return (
        f"{'Longer' if found > 0 else 'Shorter'} texts have higher scores (rank correlation {found:+.2f}; "
        f"{means[0]:.1f} words at the lowest level, {means[-1]:.1f} at the top): levels will stand for length, too."
    )
