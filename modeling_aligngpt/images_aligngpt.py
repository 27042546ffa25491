"""
The one door for images: every kind of source becomes the same 8-bit RGB pixels, within limits, in the processor,
scoring, training, servers and the demo.

Images are refused by their header, before a pixel is decoded.
"""

import base64
import binascii
import contextlib
import io
import os
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps


# Pillow opens more; some of them run other programs (EPS: Ghostscript) or are never photographs
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")


@dataclass(frozen=True)
class ImageLimits:
    """
    What an image may be. An image is resized by its shorter edge or padded to a square of its longer one, so that shape
    costs memory as well as size does.

    Args:
        max_bytes (`int`): of the encoded file.
        max_pixels (`int`): width x height.
        max_side (`int`): pixels of the longer edge; a padded image takes 12 bytes for each of its square.
        max_aspect_ratio (`float`): longer edge over shorter edge.
    """

    max_bytes: int = 64 * 2**20
    max_pixels: int = 50_000_000
    max_side: int = 10_000
    max_aspect_ratio: float = 100.0

    def check_size(self, width: int, height: int) -> None:
        """A ValueError that names what is exceeded."""
        long, short = max(width, height), min(width, height)
        if short < 1:
            raise ValueError(f"it has no pixels ({width} x {height})")
        if width * height > self.max_pixels:
            raise ValueError(f"it has {width} x {height} pixels, at most {self.max_pixels:,} are accepted")
        if long > self.max_side:
            raise ValueError(f"it is {width} x {height}, at most {self.max_side:,} pixels a side are accepted")
        if long > self.max_aspect_ratio * short:
            raise ValueError(
                f"it is {width} x {height}: one side may be at most {self.max_aspect_ratio:g} times the other"
            )

    def check_bytes(self, number: int) -> None:
        """A ValueError for a file that is too large."""
        if number > self.max_bytes:
            raise ValueError(
                f"the file has {number / 2**20:.1f} MB, at most {self.max_bytes / 2**20:g} MB are accepted"
            )


LIMITS = ImageLimits()


def read_image(source: Any, limits: ImageLimits = LIMITS, allow_urls: bool = False) -> Image.Image:
    """
    Decodes one image to RGB: upright (EXIF orientation applied), first frame of an animation, 8 bits a channel.

    Args:
        source: a PIL image, a path, encoded bytes, a `data:` URL, a `{"path", "bytes"}` dict (an undecoded
            `datasets.Image`), or a uint8 array `(height, width[, channels])`; with `allow_urls` also a web address.
        limits ([`ImageLimits`]): what is accepted.
        allow_urls (`bool`): fetch web addresses.

    Returns:
        The image in mode RGB, fully loaded.

    Raises:
        ValueError, OSError, TypeError: it is beyond the limits, of a format that is not accepted, or cannot be read.
    """
    image = _open(source, limits, allow_urls)
    limits.check_size(*image.size)
    image.load()
    with contextlib.suppress(Exception):  # broken EXIF data in an image whose pixels are fine
        image = ImageOps.exif_transpose(image)
    return to_rgb(image)


def image_size(source: Any, limits: ImageLimits = LIMITS) -> tuple[int, int]:
    """Width and height by the header alone; raises as [`read_image`] for an image beyond the limits."""
    size = _open(source, limits, allow_urls=False).size
    limits.check_size(*size)
    return size


def _open(source: Any, limits: ImageLimits, allow_urls: bool) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, dict):
        source = source["bytes"] if source.get("bytes") is not None else source.get("path")
    if isinstance(source, (bytes, bytearray)):
        return _open_file(io.BytesIO(source), len(source), limits)
    if isinstance(source, str) and source.startswith("data:"):
        return _open(_decoded(source.partition(",")[2], limits), limits, allow_urls)
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        if not allow_urls:
            raise OSError("it is a web address: download the image first")
        return _open(_fetched(source, limits), limits, allow_urls)
    if isinstance(source, (str, os.PathLike)):
        if not os.path.isfile(source):
            raise FileNotFoundError(f"there is no file {str(source)[:200]!r}")
        return _open_file(source, os.path.getsize(source), limits)
    if isinstance(source, np.ndarray):
        return Image.fromarray(source.squeeze(-1) if source.ndim == 3 and source.shape[-1] == 1 else source)
    raise TypeError("expected a PIL image, a path, bytes, a {'path', 'bytes'} dict or a uint8 array")


def _open_file(file: Any, size: int, limits: ImageLimits) -> Image.Image:
    limits.check_bytes(size)
    Image.init()
    # what this Pillow was built without
    formats = [name for name in FORMATS if name in Image.OPEN]
    with warnings.catch_warnings():
        # Pillow's own guard against bombs; ours is tighter and says more
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            return Image.open(file, formats=formats)
        except Image.DecompressionBombError:
            raise ValueError(f"it has more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels") from None
        except Image.UnidentifiedImageError:
            raise ValueError(f"it is damaged or of a format that is not accepted ({', '.join(FORMATS)})") from None


def _decoded(text: str, limits: ImageLimits) -> bytes:
    limits.check_bytes(len(text) * 3 // 4)
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"its base64 is damaged ({error})") from None


def _fetched(address: str, limits: ImageLimits) -> bytes:
    from huggingface_hub.utils import get_session

    answer = get_session().get(address, timeout=30)
    answer.raise_for_status()
    limits.check_bytes(len(answer.content))
    return answer.content


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode to RGB (itself when it is RGB already). An alpha channel is dropped, as the authors' code does."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _deep_grey_to_8_bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
    return image.convert("RGB")


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


__all__ = ["FORMATS", "LIMITS", "ImageLimits", "image_size", "read_image", "to_rgb"]
