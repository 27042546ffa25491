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
PRIMARY = "all objects"
MARK = re.compile(r"(<!-- table ([\w-]+) against ([^:>]+?) -->\n).*?(<!-- end -->)", re.DOTALL)


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


def table(name: str, against: str) -> str:
    """Markdown: shares of each arm, and the difference of the primary endpoint to one of them."""
    runs = read_runs(RUNS / f"{name}.jsonl")
    found, rows = [], []
    for arm, of_arm in runs.items():
        seeds = sorted(of_arm.keys() & runs[against].keys())
        if arm != against:
            own, other = (hits(each, seeds, PRIMARY) for each in (of_arm, runs[against]))
            found.append((arm, len(seeds), *bootstrap(own - other)))
    corrected = dict(zip([row[0] for row in found], holm([row[5] for row in found]), strict=True))
    by_arm = {row[0]: row for row in found}
    for arm, of_arm in runs.items():
        shares = [hits(of_arm, sorted(of_arm), measure).mean() for measure in (PRIMARY, "exact", "absent object")]
        cells = [arm, str(len(of_arm)), *(f"{share:.3f}" for share in shares)]
        lowest = "lowest" in next(iter(of_arm.values()))
        cells.append(f"{hits(of_arm, sorted(of_arm), PRIMARY, 'lowest').mean():.3f}" if lowest else "")
        if arm in by_arm:
            _, _, mean, low, high, _ = by_arm[arm]
            cells += [f"{mean:+.3f} ({low:+.3f} to {high:+.3f})", f"{corrected[arm]:.3f}"]
        else:
            cells += ["", ""]
        rows.append("| " + " | ".join(cells) + " |")
    columns = ("arm", "seeds", PRIMARY, "exact", "absent object", f"{PRIMARY}, level 0", f"{PRIMARY} less {against}")
    head = "| " + " | ".join([*columns, "p (Holm)"]) + " |"
    return "\n".join([head, "|---|---|---|---|---|---|---|---|", *rows]) + "\n"


def render(page: str) -> str:
    """The page with its tables written anew."""
    return MARK.sub(lambda found: found[1] + table(found[2], found[3]) + found[4], page)


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
