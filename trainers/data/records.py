"""One record of a source, images still encoded, and what can be wrong with it; for data sets and streams alike."""

import base64
import dataclasses
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageOps
from datasets import Audio, Dataset, Image, IterableDataset, List, Value, Video

from modeling_aligngpt.images_aligngpt import array_to_image, shortened, with_alpha

from .columns import IMAGE_COLUMNS, IMAGE_KEYS, NAMES, OTHER_COLUMNS
from .conversations import ACCEPTED, EMPTY, FOREIGN, MORE, PAIRS, BadRow, Broken, find_layout, to_messages
from .images import resolve_path


logger = logging.getLogger(__name__)

MESSAGES = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})
OPTIONAL = {"id": Value("string"), "clip_score": Value("float32"), "align_level": Value("int64")}
MOST_LEVELS = 2**31  # what could be a level; the model's own number is for the collator
UNUSED = {"model", "url", "source", "dataset", "json"}  # columns that public releases carry: left out without a word
USED_COLUMNS = {*NAMES, *FOREIGN, "objects"}.difference(IMAGE_COLUMNS)
ADDRESSES = {"url", "image_url", "image_link"}


def check_columns(columns: set[str], title: str) -> None:
    """Raises ValueError when no layout is recognised; warns of columns that have no effect."""
    layout = find_layout(columns)
    if layout is None or (layout in PAIRS and not columns & set(IMAGE_COLUMNS)):
        found = f"{title}: found the columns {', '.join(sorted(map(str, columns)))}"
        if addresses := [name for name in columns if str(name).lower() in ADDRESSES]:
            raise ValueError(
                f"{found}: {addresses[0]} holds addresses of images: fetch them first, as img2dataset does."
            )
        raise ValueError(f"{found}; accepted are {ACCEPTED}.")
    used = {*layout, *MORE, *IMAGE_COLUMNS, *OTHER_COLUMNS, *FOREIGN, *UNUSED}
    if columns - used:
        logger.warning("%s: columns not used: %s.", title, ", ".join(sorted(map(str, columns - used))))


def convert_record(record: dict[str, Any], num_images: int) -> tuple[list[dict], dict[str, Any]]:
    """Messages of a record, and its id, finished score and finished level where it has them; BadRow if unusable."""
    layout = find_layout({column for column in record if record[column] is not None})
    if layout is None:
        raise BadRow(f"has only {', '.join(record)}; accepted are {ACCEPTED}", EMPTY)
    messages, found = to_messages(record, layout, num_images), _optional(record)
    for number, message in enumerate(messages):
        check_text("".join(block.get("text", "") for block in message["content"]), f"message {number}")
    check_text(found.get("id", ""), "id")
    return messages, found


def check_text(text: str, where: str) -> None:
    """Raises BadRow for a text that cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        # as which a byte that is not UTF-8 was read
        is_byte = 0xDC80 <= code <= 0xDCFF
        what = f"byte 0x{code - 0xDC00:02x}" if is_byte else f"\\u{code:04x}, half of a character"
        raise BadRow(f"{where}: not UTF-8 text ({what}, at character {error.start})") from None


def name_of(record: dict[str, Any]) -> str | int | float | None:
    """The `id` by which errors name a record, if it has one that can be written."""
    name = record.get("id")
    if isinstance(name, str):
        return name.encode(errors="backslashreplace").decode()
    return name if isinstance(name, (int, float)) else None


def _optional(record: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {} if record.get("id") is None else {"id": str(record["id"])}
    for column in ("align_level", "similarity"):
        value = record.get(column)
        if value is None or value == "":
            continue
        if isinstance(value, bool) or not float(value).is_integer() or not 0 <= float(value) < MOST_LEVELS:
            hint = " (a raw score goes into `clip_score`)" if column == "similarity" else ""
            raise BadRow(f"{column} is {value!r}, not a level 0, 1, 2, ...{hint}")
        found.setdefault("align_level", int(float(value)))
    score = _score(record.get("clip_score"))
    if score is not None:
        found["clip_score"] = score
    return found


def _score(value: Any) -> float | None:
    """A score, or the mean of a list of them; None where there is no value (in tables also NaN)."""
    values = value if isinstance(value, (list, tuple)) else [value]
    values = [item for item in values if item not in (None, "") and item == item]
    try:
        if any(isinstance(item, bool) for item in values):
            raise ValueError
        score = math.fsum(map(float, values)) / len(values) if values else None
    except (TypeError, ValueError):
        raise BadRow(f"clip_score is {shortened(repr(value))}, not a number") from None
    if score is not None and not math.isfinite(score):
        raise BadRow(f"clip_score is {score}, not a number")
    return score


def check_file(path: str, check: bool) -> list[str]:
    """What is wrong with an image's path, if anything."""
    if check and not path.startswith(("http://", "https://", "hf://")) and not os.path.isfile(path):
        return [f"no such image file {shortened(path)!r} (is image_folder right?)"]
    return []


def encode_images(record: dict[str, Any], folder: Path | str | None, check: bool) -> tuple[list[dict], list[str]]:
    """(the record's images as `{"path", "bytes"}`, undecoded; what is wrong with them, or with the whole record)."""
    if isinstance(record, Broken):
        return [], [record.problem]
    value = next((record[column] for column in IMAGE_COLUMNS if record.get(column) is not None), [])
    values = value if isinstance(value, (list, tuple)) else [value]
    values = [item for item in values if not (isinstance(item, str) and item == "")]
    inside = not values
    values = values or list(_images_in_parts(record))
    images, problems = [], []
    for item in values:
        try:
            if inside and isinstance(item, str) and item.startswith(("http://", "https://")):
                raise ValueError(f"the web address {shortened(item)}: fetch it first, and name the file")
            item = _as_bytes(item)
            outside = isinstance(item, dict) and item.get("bytes") is None and item.get("path")
            if isinstance(item, (str, os.PathLike)) or outside:
                item = resolve_path(str(item["path"] if outside else item), folder)
                problems += check_file(item, check)
            check_text(item if isinstance(item, str) else "", "image path")
            images.append(Image().encode_example(_keep_pixels(item)))
        except Exception as error:
            problems.append(f"unusable image value of type {type(item).__name__} ({error})")
    return images, problems


def _images_in_parts(record: dict[str, Any]) -> Iterator[Any]:
    """The images that stand in a record's messages themselves, in reading order."""
    turns = [turn for column in ("messages", "conversations", "prompt") for turn in _listed(record.get(column))]
    for part in (part for turn in turns if isinstance(turn, dict) for part in _listed(turn.get("content"))):
        if isinstance(part, dict) and part.get("type") in ("image", "image_url"):
            key = next((key for key in IMAGE_KEYS if part.get(key) is not None), None)
            value = part[key] if key is not None else None
            value = value.get("url", value) if isinstance(value, dict) else value
            if isinstance(value, str):
                value = f"data:,{value}" if key == "base64" else value.removeprefix("file://")
            if value is not None:
                yield value


def _listed(value: Any) -> list[Any] | tuple[Any, ...]:
    return value if isinstance(value, (list, tuple)) else ()


def _as_bytes(value: Any) -> Any:
    """What a `data:` URL holds; any other value as it is."""
    if not isinstance(value, str) or not value.startswith("data:"):
        return value
    return base64.b64decode(value.partition(",")[2], validate=True)


def _keep_pixels(value: Any) -> Any:
    """
    A PIL image in memory upright and to be stored without loss: `datasets` drops its EXIF data, and saves JPEG. An
    array or tensor becomes such an image.
    """
    if hasattr(value, "shape"):
        return array_to_image(value)
    if not isinstance(value, PIL.Image.Image) or getattr(value, "filename", ""):
        return value
    if "transparency" in value.info:  # which is not stored with every mode
        value = with_alpha(value)
    try:
        return PIL.ImageOps.exif_transpose(value)  # a copy, which has no format
    except Exception:  # broken EXIF data
        return value.copy()


def left_encoded(rows: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Rows whose columns of images, audio and video are not decoded when a row is read."""
    for column, kind in (rows.features or {}).items():
        inner = getattr(kind, "feature", kind)
        if isinstance(inner, (Image, Audio, Video)):
            encoded = dataclasses.replace(inner, decode=False)
            rows = rows.cast_column(column, encoded if inner is kind else List(encoded))
    return rows


def has_image(messages: list[dict]) -> bool:
    """Whether a conversation shows an image."""
    return any(block["type"] == "image" for message in messages for block in message["content"])
