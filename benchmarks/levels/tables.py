"""Writes the tables of README.md from the runs beside it: `python -m benchmarks.levels.tables`.

Intervals are of 10,000 bootstrap draws of seeds and, within each, of images; arms are paired by seed and image.
p values are corrected by Holm over the comparisons of a table.
"""

import json
import re
from pathlib import Path

import numpy as np


HERE = Path(__file__).parent
RUNS, PAGE = HERE / "runs", HERE / "README.md"
DRAWS = 10_000
# part -> primary endpoint, and further shares that are shown
MEASURES = {
    "kinds": ("kind", ()),
    "words": ("picture of eight", ()),
    "": ("all objects", ("exact", "absent object")),
}
# what the development seeds chose of the likelihood of other images to take off; world two has the whole alone
SHOWN = ("less 0.25 of other images", "less 1 of other images")
# 97.5 % quantiles of Student's t at 1 to 9 degrees of freedom
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
MARK = re.compile(r"(<!-- (table|judging) ([\w-]+)(?: against ([^:>]+?))? -->\n).*?(<!-- end -->)", re.DOTALL)


def read_runs(path: Path) -> dict[str, dict[int, dict]]:
    """Arm -> seed -> run."""
    runs: dict[str, dict[int, dict]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        run = json.loads(line)
        runs.setdefault(run["arm"], {})[run["seed"]] = run
    return runs


def hits(runs: dict[int, dict], seeds: list[int], measure: str, level: str = "top") -> np.ndarray:
    """[seeds, images] of 0 and 1."""
    return np.array([[int(bit) for bit in runs[seed][level][measure]] for seed in seeds], dtype=float)


def bootstrap(differences: np.ndarray, seed: int = 0) -> tuple[float, float, float, float]:
    """Mean of [seeds, images], the ends of its 95 % interval, and the two-sided p value of 0."""
    rng = np.random.default_rng(seed)
    seeds, images = differences.shape
    means = np.empty(DRAWS)
    for draw in range(DRAWS):
        rows = differences[rng.integers(seeds, size=seeds)]
        means[draw] = np.take_along_axis(rows, rng.integers(images, size=rows.shape), axis=1).mean()
    low, high = np.quantile(means, (0.025, 0.975))
    tail = min((means <= 0).mean(), (means >= 0).mean())
    return differences.mean(), low, high, max(min(1.0, 2 * tail), 1 / DRAWS)


def holm(values: list[float]) -> list[float]:
    """p values corrected for their number, in the order given."""
    order, corrected, largest = np.argsort(values), [0.0] * len(values), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - place) * values[index]))
        corrected[index] = largest
    return corrected


def measures_of(name: str) -> tuple[str, tuple[str, ...]]:
    return MEASURES.get(name.partition("-")[2], MEASURES[""])


def table(name: str, against: str) -> str:
    """Markdown: shares of each arm, and the difference of the primary endpoint to one of them."""
    primary, others = measures_of(name)
    runs = read_runs(RUNS / f"{name}.jsonl")
    found = {}
    for arm, of_arm in runs.items():
        seeds = sorted(of_arm.keys() & runs[against].keys())
        if arm != against and seeds:
            own, other = (hits(each, seeds, primary) for each in (of_arm, runs[against]))
            found[arm] = bootstrap(own - other)
    corrected = dict(zip(found, holm([each[3] for each in found.values()]), strict=True))
    rows = []
    for arm, of_arm in runs.items():
        seeds = sorted(of_arm)
        cells = [arm, str(len(seeds)), *(f"{hits(of_arm, seeds, each).mean():.3f}" for each in (primary, *others))]
        lowest = "lowest" in of_arm[seeds[0]]
        cells.append(f"{hits(of_arm, seeds, primary, 'lowest').mean():.3f}" if lowest else "")
        mean, low, high, _ = found.get(arm, (0, 0, 0, 0))
        cells += [f"{mean:+.3f} ({low:+.3f} to {high:+.3f})", f"{corrected[arm]:.3f}"] if arm in found else ["", ""]
        rows.append(cells)
    columns = ["arm", "seeds", primary, *others, f"{primary}, level 0", f"{primary} less {against}", "p (Holm)"]
    return markdown(columns, rows)


def judging(name: str) -> str:
    """Markdown: AUC of each way to judge, and how far the mean level stands above it in the same seeds."""
    runs = read_runs(RUNS / f"{name}.jsonl")
    judged = {
        arm: {seed: run["judging"] for seed, run in of_arm.items() if "judging" in run} for arm, of_arm in runs.items()
    }
    levels = judged["robust, fast"]
    rows = []
    for arm in ("none", "robust, fast", "shuffled"):
        of_arm = judged.get(arm, {})
        for way in next(iter(of_arm.values()), {}):
            less = way[way.index("less") :] if "less" in way else None
            if arm == "shuffled" and way != "mean level":
                continue
            if (way == "teacher" and arm != "none") or (less and less != SHOWN[name.startswith("real")]):
                continue
            seeds = sorted(of_arm.keys() & levels.keys())
            values = [of_arm[seed][way] for seed in seeds]
            cells = [way if way == "teacher" else f"{way}; {arm}", str(len(seeds))]
            cells += [
                f"{np.mean([value[kind] for value in values]):.3f}" if kind in values[0] else ""
                for kind in ("within", "across")
            ]
            apart = np.array([levels[seed]["mean level"]["within"] - of_arm[seed][way]["within"] for seed in seeds])
            same = (arm, way) == ("robust, fast", "mean level")
            cells.append("" if same else interval(apart))
            rows.append(cells)
    return markdown(["way; arm", "seeds", "AUC within a form", "across forms", "mean level less this, within"], rows)


def interval(values: np.ndarray) -> str:
    """Mean and 95 % t interval over seeds."""
    half = T[len(values) - 2] * values.std(ddof=1) / len(values) ** 0.5
    return f"{values.mean():+.3f} ({values.mean() - half:+.3f} to {values.mean() + half:+.3f})"


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def render(page: str) -> str:
    """The page with its tables written anew."""

    def written(found: re.Match) -> str:
        head, kind, name, against, end = found.groups()
        return head + (table(name, against) if kind == "table" else judging(name)) + end

    return MARK.sub(written, page)


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
