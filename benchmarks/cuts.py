"""
What each cut does to the counts of the levels, on as many simulated scores as stage 1 of the paper has pairs:
`python benchmarks/cuts.py` prints the table of docs/concepts.md.
"""

import numpy as np

from aligngpt_trainers.scoring.levels import cut_levels


PAIRS, LEVELS = 558_128, 8


def table() -> str:
    """Pairs in each level by cut, as Markdown; normal scores, seed 0."""
    scores = np.random.default_rng(0).standard_normal(PAIRS)
    lines = [f"| cut | {' | '.join(map(str, range(LEVELS)))} |", "|---" * (LEVELS + 1) + "|"]
    for method in ("uniform", "robust", "quantile"):
        counts = cut_levels(scores, LEVELS, method)[2]
        lines.append(f"| `{method}` | {' | '.join(f'{count:,}' for count in counts)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
