"""Pairs of each level for a data set's card: images made small, and their texts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Image, List

from modeling_aligngpt.images_aligngpt import read_image


FOLDER = "assets"
PER_LEVEL, LARGEST_SIDE, MOST_LETTERS = 2, 160, 160


def draw_samples(splits: Mapping[str, Dataset], num_levels: int, output: Path) -> list[dict[str, Any]]:
    """
    The pairs whose scores are in the middle of each level's, the top level first; the same data give the same pairs.

    Args:
        splits: rows `images`, `messages`, `clip_score`, `align_level`.
        num_levels: how many there are.
        output: folder that gets `assets/level-K-I.png`.

    Returns:
        For each level with rows `level` and `pairs`, each with `image` (below `output`), `text` and `score`.
    """
    rows = next(iter(splits.values()))
    levels, scores = np.asarray(rows["align_level"][:]), np.asarray(rows["clip_score"][:])
    stored = rows.cast_column("images", List(Image(decode=False)))
    (output / FOLDER).mkdir(parents=True, exist_ok=True)
    found = []
    for level in reversed(range(num_levels)):
        members = np.flatnonzero(levels == level)
        members = members[np.argsort(scores[members], kind="stable")]
        begin = max(0, (len(members) - PER_LEVEL) // 2)
        pairs = []
        for number, row in enumerate(members[begin : begin + PER_LEVEL].tolist()):
            name = f"{FOLDER}/level-{level}-{number}.png"
            image = read_image(stored[row]["images"][0]).convert("RGB")
            image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
            image.save(output / name, "PNG")
            text = plain(answer_of(stored[row]["messages"]))
            pairs.append({"image": name, "text": text, "score": f"{scores[row]:.3f}"})
        if pairs:
            found.append({"level": level, "pairs": pairs})
    return found


def answer_of(messages: list[dict[str, Any]]) -> str:
    """The text of the last answer."""
    content = [message["content"] for message in messages if message["role"] == "assistant"][-1]
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


def plain(text: str) -> str:
    """A text for a cell of a Markdown table: one line, shortened, with nothing that Markdown or HTML would read."""
    text = " ".join(text.split())
    text = text if len(text) <= MOST_LETTERS else text[:MOST_LETTERS].rstrip() + " ..."
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]()#|!~$" else letter for letter in text)
