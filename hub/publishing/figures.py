"""The cards' images: loss curves and score histograms. The same records give the same bytes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


STAGES = {"pretrain": "stage 1: pre-training", "instruct": "stage 2: instruction tuning"}


def draw_curves(stages: list[dict[str, Any]], path: Path) -> None:
    """The training loss by step, one panel a stage, and the evaluation loss where there is one."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    drawn = [stage for stage in stages if len(stage.get("loss_curve") or []) > 1]
    figure = Figure(figsize=(4.8 * len(drawn), 3.2), layout="constrained")
    for number, stage in enumerate(drawn, start=1):
        axes = figure.add_subplot(1, len(drawn), number)
        steps, losses = zip(*stage["loss_curve"], strict=True)
        axes.plot(steps, losses, color="#1f6fb4", linewidth=1.6, label="training")
        evals = [
            (log["step"], log["eval_loss"]) for log in stage.get("eval") or [] if "eval_loss" in log and "step" in log
        ]
        if evals:
            axes.plot(*zip(*evals, strict=True), color="#d1651f", marker="o", markersize=4, label="evaluation")
            axes.legend(frameon=False)
        axes.set_title(STAGES.get(stage["stage"], stage["stage"]), fontsize=11)
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    # no date and no version in the file: the same run gives the same bytes
    figure.savefig(path, dpi=120, metadata={"Software": None})


def draw_histogram(scores: Sequence[float], edges: Sequence[float], path: Path) -> None:
    """Scores in 60 bins, the levels' edges as lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.hist(scores, bins=60, color="#1f6fb4")
    for edge in edges:
        axes.axvline(edge, color="#d1651f", linewidth=0.8)
    axes.set_xlabel("score")
    axes.set_ylabel("pairs")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120, metadata={"Software": None})
