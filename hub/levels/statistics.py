"""Does something rise with the level, and does the gate tell kinds of questions apart? Tests by permutation."""

from collections.abc import Sequence
from typing import Any

import numpy as np


PERMUTATIONS = 2000


def trend(values: Sequence[Sequence[float]] | np.ndarray, seed: int = 0) -> dict[str, Any]:
    """
    Whether a measure rises or falls with the level.

    Each image is measured at every level, so images are compared with themselves: the levels are shuffled within
    each image, and the p-value is the share of shuffles whose slope is as steep as the one observed (both ways).

    Args:
        values: [images, levels].
        seed: of the shuffles.

    Returns:
        `mean` and `error` (standard error) of each level; `spearman` and `kendall` of the means with the level (0 when
        all means are equal); `slope` (change from one level to the next) and `p`.

    Raises:
        ValueError: fewer than two images or levels.
    """
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or min(table.shape) < 2:
        raise ValueError(f"A trend needs at least two images and two levels; got the shape {table.shape}.")
    images, levels = table.shape
    weights = np.arange(levels) - (levels - 1) / 2
    weights /= (weights**2).sum()
    rng = np.random.default_rng(seed)
    observed = (table @ weights).mean()
    shuffled = np.array([(rng.permuted(table, axis=1) @ weights).mean() for _ in range(PERMUTATIONS)])
    tolerance = 1e-12 * max(np.abs(table).max(), 1e-12)
    as_steep = (np.abs(shuffled) >= abs(observed) - tolerance).sum()
    means = table.mean(0)
    return {
        "mean": means.tolist(),
        "error": (table.std(0, ddof=1) / np.sqrt(images)).tolist(),
        "spearman": spearman(np.arange(levels), means),
        "kendall": kendall(np.arange(levels), means),
        "slope": float(observed),
        "p": float((1 + as_steep) / (1 + PERMUTATIONS)),
    }


def ranks(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Ranks from 0 on, equal values sharing their mean rank."""
    array = np.asarray(values, dtype=np.float64)
    _, inverse, counts = np.unique(array, return_inverse=True, return_counts=True)
    starts = counts.cumsum() - counts
    return (starts + (counts - 1) / 2)[inverse]


def spearman(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray) -> float:
    """Rank correlation, -1..1; 0 where one of them does not vary."""
    a, b = (ranks(values) - ranks(values).mean() for values in (first, second))
    norm = np.sqrt((a**2).sum() * (b**2).sum())
    return float(a @ b / norm) if norm else 0.0


def kendall(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray) -> float:
    """Kendall's tau-b, -1..1; 0 where one of them does not vary."""
    a, b = (np.sign(np.subtract.outer(np.asarray(v, float), np.asarray(v, float))) for v in (first, second))
    norm = np.sqrt((a**2).sum() * (b**2).sum())
    return float((a * b).sum() / norm) if norm else 0.0


def by_group(
    weights: Sequence[Sequence[float]], groups: Sequence[str], images: Sequence[int] | None = None, seed: int = 0
) -> dict[str, Any]:
    """
    Mean gate weights of groups of questions, and whether the gate tells the groups apart.

    Args:
        weights: [questions, levels] gate weights.
        groups: of each question.
        images: number of the image of each question: questions about one image are alike, so groups are permuted
            among them alone. None: among all.
        seed: of the permutations.

    Returns:
        `all` and `groups`: for each `name`, `number`, `mean` and `spread` (standard deviation over questions) by level;
        `share`: which part of the weights' variance lies between groups (0..1), and `p`, the share of permutations of
        the groups with as much; both None for a single group.
    """
    table, names = np.asarray(weights, dtype=np.float64), np.asarray(groups)
    if table.ndim != 2 or len(table) != len(names) or not len(table):
        raise ValueError(f"{len(names)} groups for gate weights of the shape {table.shape}: one for each is needed.")
    order = list(dict.fromkeys(groups))
    codes = np.array([order.index(name) for name in groups])
    described = [_describe(name, table[codes == code]) for code, name in enumerate(order)]
    share, p = None, None
    total = ((table - table.mean(0)) ** 2).sum()
    if len(order) > 1 and total > 0:
        share = float(_between(table, codes, len(order)) / total)
        rng = np.random.default_rng(seed)
        blocks = np.zeros(len(codes), int) if images is None else np.asarray(images)
        drawn = [_between(table, _permuted(codes, blocks, rng), len(order)) / total for _ in range(PERMUTATIONS)]
        p = float((1 + (np.asarray(drawn) >= share - 1e-12).sum()) / (1 + PERMUTATIONS))
    return {"all": _describe("all", table), "groups": described, "share": share, "p": p}


def share_between(weights: Sequence[Sequence[float]] | np.ndarray, groups: Sequence[str]) -> float:
    """Which part of the variance of weights `(questions, levels)` lies between groups of questions, 0 to 1."""
    table = np.asarray(weights, dtype=np.float64)
    order = list(dict.fromkeys(groups))
    total = ((table - table.mean(0)) ** 2).sum()
    codes = np.array([order.index(name) for name in groups])
    return float(_between(table, codes, len(order)) / total) if total > 0 else 0.0


def verdict(gates: dict[str, Any]) -> str:
    """What the comparison with other gates says, in a sentence."""
    drawn = gates["random"]
    before = "" if gates["before"] is None else f", the gate before stage 2 {gates['before']:.1%}"
    found = f"Random gates: {drawn['least']:.1%} to {drawn['largest']:.1%} ({gates['number']} of them){before}."
    if gates["learned"]:
        return f"{found} The gate has learned to tell the groups apart (p = {gates['p']:.3f})."
    return f"{found} So nothing shows that the gate has learned to (p = {gates['p']:.3f})."


def _permuted(codes: np.ndarray, blocks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`codes` in random order within each block."""
    shuffled = np.empty_like(codes)
    shuffled[np.argsort(blocks, kind="stable")] = codes[np.lexsort((rng.random(len(codes)), blocks))]
    return shuffled


def _between(table: np.ndarray, codes: np.ndarray, number: int) -> float:
    counts = np.bincount(codes, minlength=number)
    sums = np.zeros((number, table.shape[1]))
    np.add.at(sums, codes, table)
    return float((counts[:, None] * (sums / counts[:, None] - table.mean(0)) ** 2).sum())


def _describe(name: str, table: np.ndarray) -> dict[str, Any]:
    return {"name": name, "number": len(table), "mean": table.mean(0).tolist(), "spread": table.std(0).tolist()}
