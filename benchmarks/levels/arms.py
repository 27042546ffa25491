"""What is compared, and how an arm's rows come from scored pairs."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from aligngpt_trainers.scoring.levels import cut_levels


LEVELS = 8


@dataclass(frozen=True)
class Arm:
    """
    A way to use scores.

    Args:
        cut: how levels are cut (see `cut_levels`); None: the model gets no level.
        keep: share of the rows, the best by score, that is trained on, in as many steps as all of them.
        cut_kept: cut the levels of the kept rows alone, as `aligngpt score --keep` does, not those of all rows.
        shuffled: deal the levels out at random, as many of each.
        as_text: the level is a number in the text in front of the answer, `<align>` is left out.
        table_rate: learning rate of the level table over the projector's.
        penalty: `image_token_penalty`.
        mixed: the alignment vector of stage 2 is the gate's mix plus the top level, as in the paper.
    """

    cut: str | None = None
    keep: float = 1.0
    cut_kept: bool = False
    shuffled: bool = False
    as_text: bool = False
    table_rate: float = 1.0
    penalty: float = 0.1
    mixed: bool = False


# the table's rate is the one that development seeds chose: plan.md
FAST = 20.0
STAGE_1 = {
    "none": Arm(),
    "uniform": Arm("uniform"),
    "uniform, fast": Arm("uniform", table_rate=FAST),
    "robust": Arm("robust"),
    "robust, fast": Arm("robust", table_rate=FAST),
    "quantile": Arm("quantile"),
    "quantile, fast": Arm("quantile", table_rate=FAST),
    "filter 0.7": Arm(keep=0.7),
    "filter 0.5": Arm(keep=0.5),
    "filter 0.3": Arm(keep=0.3),
    "filter 0.5, levels": Arm("robust", keep=0.5, table_rate=FAST),
    "filter 0.5, cut anew": Arm("robust", keep=0.5, cut_kept=True, table_rate=FAST),
    "filter 0.5, shuffled": Arm("robust", keep=0.5, shuffled=True, table_rate=FAST),
    "score as text": Arm("robust", as_text=True),
    "shuffled": Arm("robust", shuffled=True, table_rate=FAST),
    "none, no penalty": Arm(penalty=0.0),
    "robust, fast, no penalty": Arm("robust", table_rate=FAST, penalty=0.0),
}
"""Language model frozen: projector, and where there are levels the table, train."""
OPEN = {
    name: STAGE_1[name]
    for name in (
        "none",
        "robust, fast",
        "filter 0.7",
        "filter 0.5",
        "filter 0.3",
        "filter 0.5, levels",
        "score as text",
        "shuffled",
    )
}
"""Stage 1 in which the language model trains, too."""
STAGE_2 = {
    "none": Arm(),
    "gate": Arm("robust", table_rate=FAST, mixed=True),
    "own level": Arm("robust", table_rate=FAST),
    "filter 0.7": Arm(keep=0.7),
    "filter 0.5": Arm(keep=0.5),
    "filter 0.3": Arm(keep=0.3),
    "score as text": Arm("robust", as_text=True),
}
"""Noisy descriptions as answers to one question; the language model trains."""


@dataclass
class Rows:
    """Answers with the level of each; -1 where an arm knows none."""

    features: torch.Tensor
    texts: list[str]
    levels: torch.Tensor


def rows_of(arm: Arm, features: torch.Tensor, texts: list[str], scores: torch.Tensor, seed: int) -> Rows:
    """What an arm trains on."""
    values = scores.double().numpy()
    levels = np.full(len(values), -1)
    kept = np.arange(len(values))
    if arm.keep < 1:
        kept = np.sort(np.argsort(-values, kind="stable")[: round(arm.keep * len(values))])
    if arm.cut is not None:
        # a filter's rows are cut where all rows are, so that a level means the same, unless the arm says otherwise
        cut = kept if arm.cut_kept else np.arange(len(values))
        levels[cut] = cut_levels(values[cut], LEVELS, arm.cut)[0].astype(int)
        if arm.shuffled:
            levels[kept] = np.random.default_rng(seed).permutation(levels[kept])
    return Rows(features[kept], [texts[row] for row in kept], torch.tensor(levels[kept]))


def tuned(arm: Arm, **changes) -> Arm:
    """The arm with other settings, for the grid of the development seeds."""
    return replace(arm, **changes)
