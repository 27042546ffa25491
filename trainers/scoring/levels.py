"""Scores -> alignment levels: the cut, the balancing of levels, and the image of both.

Everything here goes through the scores in pieces: beside the scores themselves (4 bytes a pair) and the levels (1 byte
a pair) memory does not grow with their number, but for one copy of the scores while quantiles are looked up (for both
`"robust"` and `"quantile"`).
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np


logger = logging.getLogger(__name__)

METHODS = ("uniform", "robust", "quantile", "values", "edges")
MOST_VALUES = 64
QUANTILES = (0.01, 0.99)
# a level with a smaller share of the rows, and a top level outside these two, are worth a word
LEAST_SHARE, TOP_SHARES = 0.005, (0.02, 0.5)
PIECE = 1 << 20
BARS = 120


def cut_levels(
    scores: Sequence[float] | np.ndarray,
    num_align_levels: int | None = None,
    method: str = "uniform",
    edges: Sequence[float] | np.ndarray | None = None,
    quantiles: Sequence[float] = QUANTILES,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts scores into levels.

    The paper ranks the pairs by score and divides them at "equally spaced intervals"; the authors' release holds
    finished levels and no code that made them. `"uniform"` is the literal reading and the default: intervals of one
    width between the lowest and the highest score, so that a level means the same distance everywhere; the lone best
    and worst scores decide where the ends lie, and the levels there hold few pairs. `"robust"` has intervals of one
    width as well, but between two quantiles of the scores. `"quantile"` puts equally many pairs into each level.
    `"values"` takes whole numbers as they are: the lowest is level 0, and a rating from 1 to 5 makes five levels.
    `"edges"` applies the edges of an earlier run, so that a level keeps its meaning across data sets scored by the
    same model.

    A level holds its lower edge and not its upper one; the top level holds both. With `"robust"` and `"edges"`,
    scores below the first edge get level 0 and scores above the last one the top level.

    Args:
        scores: [num_pairs], finite.
        num_align_levels: N; by default 8, or what `edges` or the values say.
        method: one of `METHODS`.
        edges: [N + 1], rising; for `"edges"` alone.
        quantiles: the lower and the upper one, as shares of the pairs; for `"robust"` alone.

    Returns:
        levels: [num_pairs], 0 (worst aligned) to N - 1, of the smallest signed integer type that holds N.
        edges: [N + 1] float64.
        counts: [N] int64, pairs in each level.

    Raises:
        ValueError: no scores, a score that is not finite, all scores equal, ties that leave a quantile no room,
            unusable edges or quantiles.
    """
    values = np.asarray(scores)
    if values.dtype not in (np.float32, np.float64):
        values = values.astype(np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"Scores must be a non-empty list of numbers; got the shape {values.shape}.")
    _refuse_broken(values)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}.")
    if (edges is None) == (method == "edges"):
        raise ValueError('Give `edges` with method="edges", and only there.')
    bounds = (
        _check_edges(edges, num_align_levels)
        if edges is not None
        else _value_edges(values, num_align_levels)
        if method == "values"
        else _make_edges(values, 8 if num_align_levels is None else num_align_levels, method, quantiles)
    )
    levels = np.empty(len(values), np.min_scalar_type(-len(bounds)))
    counts = np.zeros(len(bounds) - 1, np.int64)
    for piece in _pieces(len(values)):
        levels[piece] = np.searchsorted(bounds[1:-1], values[piece].astype(np.float64), side="right")
        counts += np.bincount(levels[piece], minlength=len(counts))
    return levels, bounds, counts


def _pieces(total: int) -> Iterator[slice]:
    for start in range(0, total, PIECE):
        yield slice(start, min(start + PIECE, total))


def _refuse_broken(values: np.ndarray):
    broken, first = 0, None
    for piece in _pieces(len(values)):
        found = np.flatnonzero(~np.isfinite(values[piece]))
        if len(found) and first is None:
            first = piece.start + int(found[0])
        broken += len(found)
    if first is not None:
        raise ValueError(
            f"{broken} of {len(values)} scores are not finite, the first in row {first} ({values[first]})"
            ": leave these rows out before cutting levels."
        )


def _check_edges(edges: Sequence[float] | np.ndarray, num_align_levels: int | None) -> np.ndarray:
    bounds = np.asarray(edges, dtype=np.float64)
    if bounds.ndim != 1 or len(bounds) < 3 or not np.isfinite(bounds).all() or (np.diff(bounds) <= 0).any():
        raise ValueError(f"edges must be at least three finite numbers, each above the one before; got {edges}.")
    if num_align_levels is not None and num_align_levels != len(bounds) - 1:
        levels = len(bounds) - 1
        raise ValueError(f"{len(bounds)} edges make {levels} levels, but num_align_levels is {num_align_levels}.")
    return bounds


def checked_quantiles(quantiles: Sequence[float]) -> list[float]:
    """Both as numbers; a ValueError where they are not two shares, the lower first."""
    try:
        low, high = map(float, quantiles)
    except (TypeError, ValueError):
        low = high = float("nan")
    if not 0 <= low < high <= 1:
        raise ValueError(f"quantiles must be two shares of the pairs, such as 0.01 and 0.99, not {quantiles}.")
    return [low, high]


def _make_edges(values: np.ndarray, num_align_levels: int, method: str, quantiles: Sequence[float]) -> np.ndarray:
    if num_align_levels < 2:
        raise ValueError(f"num_align_levels must be at least 2, not {num_align_levels}.")
    low, high = float(values.min()), float(values.max())
    if low == high:
        raise ValueError(
            f"All {len(values)} scores are {values[0]}: they cannot be cut into levels. Check scorer and captions."
        )
    if method == "robust":
        low, high = _quantiles(values, np.array(checked_quantiles(quantiles)))
    if method in ("uniform", "robust"):
        bounds = np.linspace(low, high, num_align_levels + 1)
    else:
        bounds = _quantiles(values, np.linspace(0, 1, num_align_levels + 1))
    if (np.diff(bounds) <= 0).any():
        raise ValueError(
            f"{num_align_levels} {method} levels do not fit these {len(values)} scores: neighbouring edges coincide, "
            'because too many scores are equal. Use fewer levels, or method="uniform".'
        )
    return bounds


def _value_edges(values: np.ndarray, num_align_levels: int | None) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    if any((values[piece] != np.round(values[piece])).any() for piece in _pieces(len(values))):
        raise ValueError('method="values" takes whole numbers, such as ratings from 1 to 5; cut others by "robust".')
    number = int(high - low) + 1
    if not 2 <= number <= MOST_VALUES or num_align_levels not in (None, number):
        asked = "" if num_align_levels in (None, number) else f", but num_align_levels is {num_align_levels}"
        raise ValueError(
            f"The whole numbers from {low:g} to {high:g} make {number} levels{asked}; from 2 to {MOST_VALUES} can be "
            "taken as they are."
        )
    return np.arange(number + 1) + low - 0.5


def _quantiles(values: np.ndarray, fractions: np.ndarray) -> np.ndarray:
    """`np.quantile(values.astype(float64), fractions)`, bit for bit, with one copy of the scores in their own type."""
    places = fractions * (len(values) - 1)
    below = np.floor(places).astype(np.int64)
    above = np.minimum(below + 1, len(values) - 1)
    ordered = np.partition(values, np.unique([below, above]))
    low, high = ordered[below].astype(np.float64), ordered[above].astype(np.float64)
    del ordered
    share, distance = places - below, high - low
    return np.where(share < 0.5, low + distance * share, high - distance * (1 - share))


def mean_of_levels(scores: np.ndarray, levels: np.ndarray, num_align_levels: int) -> list[float | None]:
    """The mean score of each level; None where a level is empty, levels below 0 are left out."""
    sums, counts = np.zeros(num_align_levels), np.zeros(num_align_levels, np.int64)
    for piece in _pieces(len(scores)):
        inside = levels[piece] >= 0
        part = levels[piece][inside]
        sums += np.bincount(part, scores[piece][inside].astype(np.float64), minlength=num_align_levels)
        counts += np.bincount(part, minlength=num_align_levels)
    return [float(total / count) if count else None for total, count in zip(sums, counts, strict=True)]


def faults_of_levels(counts: Sequence[int] | np.ndarray) -> list[str]:
    """What is wrong with levels of these sizes ([N], worst aligned first), each in a clause."""
    shares = np.asarray(counts) / np.sum(counts)
    few, top = np.flatnonzero(shares < LEAST_SHARE), shares[-1]
    faults = []
    if len(few):
        who = f"level {few[0]} holds" if len(few) == 1 else f"levels {', '.join(map(str, few))} hold"
        faults.append(f"{who} under {LEAST_SHARE:.1%} of the rows, too few to train their embeddings")
    if top < TOP_SHARES[0]:
        faults.append(f"the top level, which stage 2 adds to every input, holds {top:.2%}")
    if top > TOP_SHARES[1]:
        faults.append(f"the top level holds {top:.0%} and tells few rows apart")
    return faults


def remedy_for_levels(scores: np.ndarray, counts: Sequence[int] | np.ndarray) -> str:
    """The cuts that have fewer faults than these levels, tried on the scores themselves, up to the first without any.

    Args:
        scores: [num_pairs].
        counts: [N] of the levels that have faults.

    Returns:
        Settings with their effect, or the advice to take fewer levels.
    """
    found = []
    for method in ("robust", "quantile"):
        try:
            others = cut_levels(scores, len(counts), method)[2]
        except ValueError:  # ties
            continue
        faults, shares = faults_of_levels(others), others / others.sum()
        if len(faults) < len(faults_of_levels(counts)):
            found.append(f"--binning {method} (smallest level {shares.min():.1%}, top level {shares[-1]:.1%})")
        if not faults:
            break
    return " or ".join(found) or f"fewer levels (--num_align_levels below {len(counts)})"


def balance_levels(levels: np.ndarray, counts: np.ndarray, samples_per_level: int | None, seed: int) -> np.ndarray:
    """Which pairs to keep so that levels hold equally many: a draw without replacement from each level.

    Args:
        levels: [num_pairs], 0 to N - 1.
        counts: [N], pairs in each level.
        samples_per_level: pairs to keep of each level; a level with fewer keeps all of them. By default as many as the
            smallest level that is not empty.
        seed: of the draw. The same levels and seed give the same pairs.

    Returns:
        [num_pairs] bool.
    """
    target = samples_per_level or int(counts[counts > 0].min())
    random = np.random.default_rng(seed)
    kept = np.ones(len(levels), bool)
    for level in np.flatnonzero(counts > target):
        members = np.flatnonzero(levels == level)
        kept[members[random.choice(len(members), len(members) - target, replace=False, shuffle=False)]] = False
    return kept


def draw_histogram(scores: np.ndarray, edges: np.ndarray, counts: np.ndarray, title: str, meaning: str, path: Path):
    """Writes a PNG of the distribution of scores with the edges drawn and each level's number of pairs.

    Args:
        scores: [num_pairs].
        edges: [N + 1].
        counts: [N].
        title: of the image.
        meaning: of a score, for the axis.
        path: where to.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("matplotlib is not installed, so no %s: `pip install matplotlib`.", path.name)
        return
    low, high = min(float(scores.min()), edges[0]), max(float(scores.max()), edges[-1])
    bars, bounds = np.histogram(scores, min(BARS, max(10, int(2 * len(scores) ** 0.5))), (low, high))
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.stairs(bars, bounds, fill=True, color="#4c72b0", alpha=0.8)
    axes.vlines(edges, 0, 1, transform=axes.get_xaxis_transform(), color="#c44e52", linewidth=1.5)
    centres, width = (edges[:-1] + edges[1:]) / 2, np.diff(edges).min() / (high - low)
    crowded = width < 0.8 / len(counts)
    for level, (centre, count) in enumerate(zip(centres, counts, strict=True)):
        axes.annotate(
            f"level {level}\n{count:,}",
            (centre, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3 + 22 * (level % 2) * crowded),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=6 if len(counts) > 10 else 8,
        )
    axes.set_title(title, pad=32 + 22 * crowded, fontsize=10)
    axes.set_xlabel(f"score ({meaning})")
    axes.set_ylabel("pairs")
    axes.set_xlim(low - 0.01 * (high - low), high + 0.01 * (high - low))
    figure.savefig(path, dpi=120, format="png")
