"""Pictures of every kind, decoded to RGB the same way for scoring, training and tests."""

import contextlib
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps


def _describe(value: Any) -> str:
    """How an error message names a picture."""
    if isinstance(value, dict):
        if value.get("bytes") is None:
            return f"file {value.get('path')!r}"
        name = f" of {value['path']!r}" if value.get("path") else ""
        return f"{len(value['bytes'])} bytes{name} stored in the data set"
    if isinstance(value, (str, os.PathLike)):
        return f"file {str(value)!r}"
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    return f"a value of type {type(value).__name__}"


def _open(value: Any) -> Image.Image:
    """A PIL picture from a PIL picture, path, bytes, `{"path", "bytes"}` dict or uint8 array [H, W(, C)]."""
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, (bytes, bytearray)):
        return Image.open(io.BytesIO(value))
    if isinstance(value, (str, os.PathLike)):
        if str(value).startswith(("http://", "https://")):
            raise OSError("it is a web address: download the picture first")
        return Image.open(value)
    if isinstance(value, np.ndarray):
        return Image.fromarray(value.squeeze(-1) if value.ndim == 3 and value.shape[-1] == 1 else value)
    raise TypeError("expected a PIL picture, a path, bytes, a {'path', 'bytes'} dict or a uint8 array")


def _deep_grey_to_8_bit(image: Image.Image) -> Image.Image:
    """16- and 32-bit greyscale to 8 bits. PIL's own `convert` clips everything above 255 to white."""
    values = np.asarray(image)
    if image.mode.startswith("I;16"):
        return Image.fromarray((values >> 8).astype(np.uint8))
    values = np.nan_to_num(values.astype(np.float64))
    low, high = float(values.min()), float(values.max())
    if image.mode == "F" and low >= 0 and high <= 1:
        values = values * 255
    elif low >= 0 and high <= 255:
        pass
    elif low >= 0 and high <= 65535:
        values = values / 257
    else:
        values = (values - low) * (255 / (high - low))
    return Image.fromarray(values.round().astype(np.uint8))


def to_rgb(image: Image.Image) -> Image.Image:
    """
    Any PIL mode to RGB (the same object when it is RGB already). An alpha channel is dropped, as the processor and the
    authors' code do, so that a picture is scored, trained on and asked about as the same pixels.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _deep_grey_to_8_bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
    return image.convert("RGB")


def load_image(value: Any, row: int | str | None = None) -> Image.Image:
    """Decodes one picture to RGB: upright (EXIF orientation applied), first frame of an animation, 8 bits.

    Args:
        value: a PIL picture, a path, encoded bytes, the `{"path", "bytes"}` dict of an undecoded
            `datasets.Image`, or a uint8 array [height, width(, channels)].
        row: the data set's row, for the error message.

    Returns:
        The picture in mode RGB, fully loaded.

    Raises:
        ValueError: naming row, file and remedy, for a picture that cannot be read.
    """
    try:
        image = _open(value)
        image.load()
        with contextlib.suppress(Exception):  # broken EXIF data in a picture whose pixels are fine
            image = ImageOps.exif_transpose(image)
        return to_rgb(image)
    except Exception as error:
        where = "picture" if row is None else f"row {row}: picture"
        raise ValueError(
            f"{where} cannot be read ({_describe(value)}): {type(error).__name__}: {error}. Repair or remove the "
            f'file, or leave such rows out with on_bad_row="skip".'
        ) from error


def resolve_path(path: str, folder: str | Path | None) -> str:
    """`path` below `folder` unless it is absolute (or there is no folder)."""
    return path if folder is None or os.path.isabs(path) else os.path.join(folder, path)
