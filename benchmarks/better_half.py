"""
What the better half of the pairs holds by each scorer of an ablation (`--keep-models`); benchmarks/ablation.md.

    python benchmarks/better_half.py --ablation runs/ablation --seeds 0 1 2 3 4
"""

import argparse
from pathlib import Path
from statistics import mean
from typing import Any

from aligngpt_playground.ablation.rows import added_scores, best_rows
from aligngpt_playground.measures import TRUE_KINDS, truth_aucs


def scorers(world: Path, name: str) -> dict[str, Any]:
    """The pairs, or noisy descriptions, of a seed as scored by CLIP, by the judge and by both, with their kinds."""
    from datasets import load_from_disk

    drawn = load_from_disk(str(world / "data" / name))
    kinds = (drawn["train"] if isinstance(drawn, dict) else drawn)["kind"][:]
    clip, judge = (load_from_disk(str(world / f"{prefix}-{name}")) for prefix in ("scored", "levels-8"))
    found = {"CLIP": clip, "the judge": judge, "both": added_scores(clip, judge)}
    return {scorer: rows.add_column("kind", kinds) for scorer, rows in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ablation", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    args = parser.parse_args()
    print("| rows | scorer | AUC, true from untrue | exact from wrong | untrue in the better half | exact in it |")
    print("|---|---|---|---|---|---|")
    for name in ("pairs", "noisy"):
        by_seed = [scorers(args.ablation / f"seed-{seed}" / "world", name) for seed in args.seeds]
        for scorer in by_seed[0]:
            cells: dict[str, list[float]] = {"true": [], "exact": [], "untrue in": [], "exact in": []}
            for rows in (found[scorer] for found in by_seed):
                aucs = truth_aucs(rows["clip_score"][:], rows["kind"][:])
                cells["true"].append(aucs["true from untrue"])
                cells["exact"].append(aucs["exact from wrong"])
                kept = best_rows(rows, 0.5)["kind"][:]
                cells["untrue in"].append(mean(kind not in TRUE_KINDS for kind in kept))
                cells["exact in"].append(mean(kind == "exact" for kind in kept))
            print(f"| {name} | {scorer} | {' | '.join(f'{mean(values):.3f}' for values in cells.values())} |")


if __name__ == "__main__":
    main()
