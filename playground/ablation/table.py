"""Finished runs of the ablation -> means, spreads and paired differences."""

import math
import statistics
from collections.abc import Sequence
from typing import Any


TABLE_NAME = "table.json"
_T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom."""
MEASURES = {
    "clean": {
        "answers": ("questions", "overall"),
        "yes-share": ("yes_share",),
        "loss": ("loss",),
        "exact": ("captions", "exact"),
        "main object": ("captions", "main object"),
        "all objects": ("captions", "all objects"),
        "absent object": ("captions", "absent object"),
        "steering": ("captions", "by_level", "steering", "main object"),
        "judge, stage 1": ("captions", "judged", "judge", "true from untrue"),
        "judge, stage 2": ("judged", "judge", "true from untrue"),
    },
    "noisy": {
        "exact": ("descriptions", "exact"),
        "main object": ("descriptions", "main object"),
        "all objects": ("descriptions", "all objects"),
        "absent object": ("descriptions", "absent object"),
        "steering": ("by_level", "steering", "exact"),
        "judge": ("judged", "judge", "true from untrue"),
    },
}
"""
What the tables show, one for each kind of instruction data. Clean: held-out questions right, how many of those for yes
or no got a yes (half would be right), and loss of their answers after stage 2; captions after stage 1, at the top
level; how far their quality follows the level (rank correlation); how well the judge tells true captions from untrue
ones (AUC). Noisy: the same of descriptions after stage 2.
"""


def half_width(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of a mean (Student's t); infinite for fewer than two values."""
    if len(values) < 2:
        return math.inf
    degrees = len(values) - 1
    quantile = _T_975[degrees - 1] if degrees <= len(_T_975) else 1.96 + 2.4 / degrees
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def summarize(
    runs: Sequence[dict[str, Any]], variants: Sequence[dict[str, Any]], data: str = "clean"
) -> dict[str, Any]:
    """A table.

    Args:
        runs: finished runs: `variant`, `seed` and the figures that `MEASURES` names.
        variants: `name`, `group`, ... in order; the first is what others are compared with.
        data: the kind of instruction data, a key of `MEASURES`.

    Returns:
        `rows`, one for each variant that has runs: for each of `MEASURES` that its runs have, and each question type in
        `types`, `mean`, `std`, and, over the seeds that both have, the mean `difference` to the first variant with
        `interval` (half the width of its 95 % interval) and `clear` (whether that leaves out 0); `shared` where stage 1
        is that variant's.
    """
    by_variant: dict[str, dict[int, dict]] = {}
    for run in runs:
        by_variant.setdefault(run["variant"], {})[run["seed"]] = run
    reference = by_variant.get(variants[0]["name"], {})
    kinds = [kind for kind in runs[0].get("questions", {}) if kind != "overall"] if runs else []
    rows = []
    for variant in variants:
        own = by_variant.get(variant["name"])
        if not own:
            continue
        row = {**variant, "seeds": sorted(own), "seconds": statistics.mean(run["seconds"] for run in own.values())}
        paths = {**MEASURES[data], **{f"type {kind}": ("questions", kind) for kind in kinds}}
        for measure, path in paths.items():
            if any(_at(run, path) is None for run in own.values()):
                continue
            row[measure] = _cell(own, reference, path)
            # of captions only where stage 1 is another
            if path[0] == "captions" and variant.get("pretrain") == variants[0].get("pretrain"):
                row[measure]["shared"] = True
        gates = [run["gate"] for run in own.values() if run["gate"]]
        if gates:
            columns = list(zip(*gates, strict=True))
            row["gate"] = [
                {key: statistics.mean(level[key] for level in column) for key in ("mean", "spread")}
                for column in columns
            ]
        rows.append(row)
    return {"rows": rows, "types": kinds, "data": data, "reference": variants[0]["name"]}


def _cell(own: dict[int, dict], reference: dict[int, dict], path: Sequence[str]) -> dict[str, Any]:
    values = {seed: _at(run, path) for seed, run in own.items()}
    compared = {seed: _at(run, path) for seed, run in reference.items()}
    paired = [value - compared[seed] for seed, value in values.items() if compared.get(seed) is not None]
    spread = statistics.stdev(values.values()) if len(values) > 1 else None
    cell = {"mean": statistics.mean(values.values()), "std": spread, "values": list(values.values())}
    width = half_width(paired)
    if own is not reference and math.isfinite(width):
        difference = statistics.mean(paired)
        cell |= {"difference": difference, "interval": width, "clear": abs(difference) > width}
    return cell


def _at(run: dict[str, Any], path: Sequence[str]) -> Any:
    """The figure at a path of keys; None where a run has none (a model without levels has no judge)."""
    found: Any = run
    for key in path:
        found = (found or {}).get(key)
    return found


def describe(table: dict[str, Any]) -> str:
    """
    A table for terminal and Markdown: means ± standard deviation over seeds, then paired differences.

    Figures of stage 1 stand once where it is that of the first variant; what no run has is left out.
    """
    measures = [name for name in MEASURES[table["data"]] if any(name in row for row in table["rows"])]
    lines = [
        "| variant | seeds | " + " | ".join(measures) + " |",
        "|---|---|" + "---|" * len(measures),
    ]
    for row in table["rows"]:
        first = row is table["rows"][0]
        cells = [_plus_minus(row.get(measure), first) for measure in measures]
        lines.append(f"| {row['name']} | {len(row['seeds'])} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Paired differences to {table['reference']}, with 95 % intervals (bold: 0 is outside):",
        "",
        "| variant | " + " | ".join(measures) + " |",
        "|---|" + "---|" * len(measures),
    ]
    for row in table["rows"][1:]:
        cells = [_difference(row.get(measure)) for measure in measures]
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _plus_minus(cell: dict[str, Any] | None, first: bool) -> str:
    if cell is None or (cell.get("shared") and not first):
        return ""
    return f"{cell['mean']:.3f}" + (f" ± {cell['std']:.3f}" if cell["std"] is not None else "")


def _difference(cell: dict[str, Any] | None) -> str:
    if cell is None or cell.get("shared") or "difference" not in cell:
        return ""
    text = f"{cell['difference']:+.3f} ± {cell['interval']:.3f}"
    return f"**{text}**" if cell["clear"] else text
