"""Images of every kind, decoded to RGB the same way for scoring, training and tests."""

import os
from pathlib import Path
from typing import Any

from PIL import Image

from modeling_aligngpt.images_aligngpt import WHITE, read_image, shortened

from .conversations import UNREADABLE, BadRow


def _describe(value: Any) -> str:
    """How an error message names an image."""
    if isinstance(value, dict):
        if value.get("bytes") is None:
            return f"file {shortened(value.get('path'))!r}"
        name = f" of {shortened(value['path'])!r}" if value.get("path") else ""
        return f"{len(value['bytes'])} bytes{name} stored in the data set"
    if isinstance(value, (str, os.PathLike)):
        return f"file {shortened(value)!r}"
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    return f"a value of type {type(value).__name__}"


def load_image(value: Any, row: int | str | None = None, transparency: str = WHITE) -> Image.Image:
    """Decodes one image to RGB, as the processor does (see [`~images_aligngpt.read_image`]).

    Args:
        value: a PIL image, a path, encoded bytes, the `{"path", "bytes"}` dict of an undecoded
            `datasets.Image`, or an array.
        row: the data set's row, for the error message.
        transparency: the processor's setting; without one, white.

    Returns:
        The image in mode RGB, fully loaded.

    Raises:
        ValueError: naming row, file and remedy, for an image that cannot be read.
    """
    try:
        return read_image(value, transparency=transparency)
    except Exception as error:
        where = "image" if row is None else f"row {row}: image"
        raise BadRow(
            f"{where} cannot be read ({_describe(value)}): {type(error).__name__}: {error}. Repair or remove the "
            f'file, or leave such rows out with on_bad_row="skip".',
            UNREADABLE,
        ) from error


def resolve_path(path: str, folder: str | Path | None) -> str:
    """`path` below `folder` unless it is absolute (or there is no folder)."""
    return path if folder is None or os.path.isabs(path) else os.path.join(folder, path)
