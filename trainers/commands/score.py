"""What the command `aligngpt score` does."""

from collections.abc import Sequence
from typing import Any

from ..scoring.config import ScoreConfig
from .settings import parse_settings


def score_command(argv: Sequence[str]) -> Any:
    """`aligngpt score`: CLIP scores and levels for a data set."""
    (config,) = parse_settings(
        "aligngpt score", (ScoreConfig,), argv, "Score image-text pairs with CLIP and cut the scores into levels."
    )
    from ..scoring.run import score_dataset

    return score_dataset(config)
