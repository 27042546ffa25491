"""Scored pairs as LLaVA JSON, in the form of the authors' release."""

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image as PILImage

from ..data.conversations import IMAGE_TOKEN
from .config import ScoreConfig


ROWS_AT_ONCE = 1000
OWN = ("id", "images", "messages", "image", "conversations", "similarity")  # what a record says in its own way


def write_json(
    path: Path, rows: Dataset, scores: np.ndarray, levels: np.ndarray, written: np.ndarray, config: ScoreConfig
):
    """The output as LLaVA JSON, the level as `similarity` as in the authors' release, one record after the other.

    Image paths are relative to `image_folder` (or the data file's folder). Images that are stored in the data set
    are written into `<name of the file>_images` beside it.

    Args:
        path: of the file, which is there whole or not at all.
        rows: with `images` and `messages`, and maybe `id`.
        scores: [rows] float32.
        levels: [rows] int, below 0 for rows that have none.
        written: [rows] bool, rows to write; those without a level have no image.
        config: `dataset` and `image_folder`.
    """
    source = Path(config.dataset)
    base = config.image_folder or (str(source.parent) if source.is_file() else None)
    images = path.with_name(f"{path.stem}_images")
    beside = path.with_name(f"{path.name}.tmp")
    columns = [name for name in rows.column_names if name not in ("align_level", "clip_score")]
    place, separator = 0, "[\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with beside.open("w", encoding="utf-8") as file:
        for batch in rows.select_columns(columns).with_format("arrow").iter(batch_size=ROWS_AT_ONCE):
            chosen = np.flatnonzero(written[place : place + len(batch)])
            for offset, row in zip(chosen.tolist(), batch.take(chosen).to_pylist(), strict=True):
                position = place + offset
                name = row.get("id") or f"{position:09d}"
                others = {key: value for key, value in row.items() if key not in OWN and value is not None}
                record: dict[str, Any] = {"id": name, **others}
                if row["images"]:
                    record["image"] = _json_image(row["images"][0], f"{position:09d}", base, images)
                messages = row["messages"]
                if config.as_text:
                    messages = with_level_as_text(messages, int(levels[position]))
                record["conversations"] = [_json_turn(message) for message in messages]
                if levels[position] >= 0:
                    record["similarity"] = int(levels[position])
                    record["clip_score"] = float(f"{scores[position]:.9g}")
                file.write(separator + json.dumps(record, ensure_ascii=False, default=str))
                separator = ",\n"
            place += len(batch)
        file.write("\n]\n")
    beside.replace(path)


def with_level_as_text(messages: list[dict[str, Any]], level: int | None) -> list[dict[str, Any]]:
    """The conversation with `fit: LEVEL` behind what its first question holds; as it is where there is no level."""
    if level is None or level < 0:
        return messages
    first = next(place for place, message in enumerate(messages) if message["role"] == "user")
    content = [*messages[first]["content"], {"type": "text", "text": f"fit: {level}"}]
    return [*messages[:first], {**messages[first], "content": content}, *messages[first + 1 :]]


def _json_turn(message: dict[str, Any]) -> dict[str, str]:
    speaker = {"user": "human", "assistant": "gpt"}.get(message["role"], message["role"])
    parts = [IMAGE_TOKEN if block["type"] == "image" else block["text"] for block in message["content"]]
    return {"from": speaker, "value": "\n".join(parts)}


def _json_image(encoded: dict[str, Any], name: str, base: str | None, folder: Path) -> str:
    """The path that stands in the JSON file; writes the image where it has no file of its own."""
    if encoded["bytes"] is not None:
        folder.mkdir(exist_ok=True)
        with PILImage.open(io.BytesIO(encoded["bytes"])) as image:
            suffix = (image.format or "png").lower().replace("jpeg", "jpg")
        (folder / f"{name}.{suffix}").write_bytes(encoded["bytes"])
        return f"{folder.name}/{name}.{suffix}"
    path = os.path.abspath(encoded["path"])
    if base is not None and Path(path).is_relative_to(os.path.abspath(base)):
        return os.path.relpath(path, base)
    return path
