"""Uploaded images: what is accepted, and where on an image the model's patches lie."""

from dataclasses import dataclass
from pathlib import Path

from answers import loaded
from PIL import Image


MAX_FILE_BYTES = 10 * 2**20
# Pillow's own guard: it holds for whatever else opens an image in this process
Image.MAX_IMAGE_PIXELS = 50_000_000


class ImageError(ValueError):
    """An image that cannot be used; the message says why, for the person who chose it."""


def read_image(path: str | Path | None) -> Image.Image:
    """
    An image file as the model's processor reads it: upright, in RGB, within its limits.

    Raises:
        ImageError: there is none, it is too large, or it cannot be read.
    """
    if path is None:
        raise ImageError("There is no image yet: choose one, paste one, or take an example.")
    size = Path(path).stat().st_size
    if size > MAX_FILE_BYTES:
        raise ImageError(f"The file has {size / 2**20:.1f} MB, at most {MAX_FILE_BYTES // 2**20} MB are accepted.")
    try:
        return loaded().processor.read_image(path, allow_urls=False)
    except ValueError as error:
        raise ImageError(f"The image cannot be used: {_without_path(error)}.") from error
    # Pillow's plugins raise many kinds of errors on damaged files
    except Exception as error:
        raise ImageError(f"The image is damaged and cannot be read: {_without_path(error)}.") from error


def _without_path(error: Exception) -> str:
    """An error's message without the file's path on this server."""
    text = str(error).partition(" '/")[0].strip().rstrip(".") or type(error).__name__
    return text[:200]


@dataclass(frozen=True)
class Box:
    """A rectangle on an image, in its pixels; it may reach beyond the edges (padding)."""

    left: float
    top: float
    width: float
    height: float


def seen_box(size: tuple[int, int], image_processor) -> Box:
    """
    The part of an image of `size` (width, height) that an image processor hands to the model: padded to a square,
    resized and cropped at the centre, each if the processor does so.
    """
    width, height = size
    left = top = 0.0
    if getattr(image_processor, "do_pad", False):
        side = max(width, height)
        left, top = -float((side - width) // 2), -float((side - height) // 2)
        width = height = side
    if not getattr(image_processor, "do_center_crop", False):
        return Box(left, top, width, height)
    crop = dict(image_processor.crop_size)
    target = dict(image_processor.size or {}) if getattr(image_processor, "do_resize", True) else {}
    if "shortest_edge" in target:
        scale_x = scale_y = target["shortest_edge"] / min(width, height)
    elif "height" in target:
        scale_x, scale_y = target["width"] / width, target["height"] / height
    else:
        scale_x = scale_y = 1.0
    seen_width, seen_height = crop["width"] / scale_x, crop["height"] / scale_y
    return Box(left + (width - seen_width) / 2, top + (height - seen_height) / 2, seen_width, seen_height)
