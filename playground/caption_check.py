"""
What is right in a caption of the small world: for `aligngpt levels --correct aligngpt_playground.caption_check:check`.
"""

from typing import Any

from .evaluate import score_caption
from .scenes import Scene


def check(caption: str, row: dict[str, Any]) -> dict[str, bool]:
    """The measures of `aligngpt_playground.evaluate.CAPTION_MEASURES` for a caption of a row with its `scene`."""
    return score_caption(caption, Scene.from_json(row["scene"]))
