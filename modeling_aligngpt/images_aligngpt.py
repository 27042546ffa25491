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
import transformers
from PIL import Image, ImageOps


# Pillow opens more; some of them run other programs (EPS: Ghostscript) or are never photographs
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
# What stands where an image is transparent: white, as on a page; or the colours that are hidden there, which come to
# light where the alpha channel is dropped (the authors' `convert("RGB")`)
WHITE, DROPPED = TRANSPARENCIES = ("white", "dropped")
# of a path, an address or encoded data in an error message
MOST_CHARACTERS = 60


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
        formats (`tuple`): of the file, by Pillow's names.
    """

    max_bytes: int = 64 * 2**20
    max_pixels: int = 50_000_000
    max_side: int = 10_000
    max_aspect_ratio: float = 100.0
    formats: tuple[str, ...] = FORMATS

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


def read_image(
    source: Any, limits: ImageLimits = LIMITS, allow_urls: bool = False, transparency: str = WHITE
) -> Image.Image:
    """
    Decodes one image to RGB: upright (EXIF orientation applied), first frame of an animation, 8 bits a channel.

    Args:
        source: a PIL image, a path, encoded bytes, a `data:` URL, base64, a `{"path", "bytes"}` dict (an undecoded
            `datasets.Image`), or an array or tensor, see [`array_to_image`]; with `allow_urls` also a web address.
        limits ([`ImageLimits`]): what is accepted.
        allow_urls (`bool`): fetch web addresses.
        transparency (`str`): one of `TRANSPARENCIES`.

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
    return to_rgb(image, transparency)


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
            return _open_base64(source, limits)
        return _open_file(source, os.path.getsize(source), limits)
    if hasattr(source, "shape"):
        return array_to_image(source)
    raise TypeError("expected a PIL image, a path, bytes, base64, a {'path', 'bytes'} dict, an array or a tensor")


def _open_base64(source: str | os.PathLike, limits: ImageLimits) -> Image.Image:
    """What transformers, too, takes a string for that names no file."""
    missing = f"there is no file {shortened(source)!r}"
    try:
        data = _decoded(str(source), limits)
    except ValueError:
        raise FileNotFoundError(missing) from None
    try:
        return _open(data, limits, allow_urls=False)
    except ValueError as error:
        raise FileNotFoundError(f"{missing}, and as base64 {error}") from None


def _open_file(file: Any, size: int, limits: ImageLimits) -> Image.Image:
    limits.check_bytes(size)
    Image.init()
    # what this Pillow was built without
    formats = [name for name in limits.formats if name in Image.OPEN]
    with warnings.catch_warnings():
        # Pillow's own guard against bombs; ours is tighter and says more
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            return Image.open(file, formats=formats)
        except Image.DecompressionBombError:
            raise ValueError(f"it has more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels") from None
        except Image.UnidentifiedImageError:
            raise ValueError(
                f"it is damaged or of a format that is not accepted ({', '.join(limits.formats)})"
            ) from None


def _decoded(text: str, limits: ImageLimits) -> bytes:
    limits.check_bytes(len(text) * 3 // 4)
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except binascii.Error as error:
        raise ValueError(f"its base64 is damaged ({error})") from None


def _fetched(address: str, limits: ImageLimits) -> bytes:
    from huggingface_hub.utils import get_session

    try:
        answer = get_session().get(address, timeout=30)
    except Exception as error:
        raise OSError(f"{shortened(address)} cannot be fetched ({type(error).__name__})") from None
    if answer.status_code != 200:
        raise OSError(f"{shortened(address)} answers with status {answer.status_code}")
    limits.check_bytes(len(answer.content))
    return answer.content


def shortened(source: Any) -> str:
    """A path, an address or encoded data for an error message: its two ends where it is long."""
    text = str(source)
    return text if len(text) <= MOST_CHARACTERS else f"{text[:20]}...{text[23 - MOST_CHARACTERS :]}"


def array_to_image(array: Any) -> Image.Image:
    """
    An array or tensor as a PIL image in mode L, LA, RGB or RGBA.

    Args:
        array: of numpy, torch or alike, as [`to_8_bit`] takes them: `(height, width)`, `(height, width, channels)` or
            `(channels, height, width)`; what could be either has its channels first, as transformers takes it.

    Raises:
        ValueError: the shape is no image's, or the values are no pixels.
    """
    pixels = to_8_bit(array)
    shape = pixels.shape
    if len(shape) == 3:
        if shape[0] in (1, 3) or (shape[0] in (2, 4) and shape[2] not in (1, 2, 3, 4)):
            pixels = np.moveaxis(pixels, 0, -1)
        if pixels.shape[2] == 1:
            pixels = pixels[..., 0]
    if pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (2,), (3,), (4,)) or not pixels.size:
        raise ValueError(f"an array of shape {shape} is no image: height and width, and 1 to 4 channels are expected")
    return Image.fromarray(np.ascontiguousarray(pixels))


def to_8_bit(array: Any) -> np.ndarray:
    """
    The pixels of an array or tensor as uint8, in its own shape: fractions from 0 to 1 (torchvision's `ToTensor`) times
    255, values up to 255 as they are, 16 bits by their upper 8, truth values as black and white.

    Raises:
        ValueError: the values are none of these.
    """
    if hasattr(array, "detach"):  # a tensor, maybe on a GPU or of a type that numpy lacks
        array = array.detach().cpu()
        array = array.float() if array.is_floating_point() else array
    values = np.asarray(array)
    if values.dtype == np.uint8 or not values.size:
        return values.astype(np.uint8)
    if values.dtype.kind not in "buif":
        raise ValueError(f"an array of {values.dtype} holds no pixels")
    low, high = float(values.min()), float(values.max())
    if values.dtype == bool or (values.dtype.kind == "f" and low >= 0 and high <= 1):
        values = values * np.float32(255)
    elif values.dtype == np.uint16 and high > 255:
        values = values >> 8
    elif not (low >= 0 and high <= 255):
        raise ValueError(
            f"its values run from {low:g} to {high:g}: scale them to 0 to 255 or to 0 to 1, or pass do_rescale=False "
            "and do_normalize=False for an image that is normalised already"
        )
    return values.round().astype(np.uint8)


def to_rgb(image: Image.Image, transparency: str = WHITE) -> Image.Image:
    """
    Any PIL mode to RGB (itself when it is RGB already).

    Args:
        image: in any mode, with or without transparency.
        transparency (`str`): one of `TRANSPARENCIES`.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    image = with_alpha(image)
    if image.mode == "RGBA" and transparency == WHITE:
        image = Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image)
    return image.convert("RGB")


def with_alpha(image: Image.Image) -> Image.Image:
    """An image of 8 bits a channel: RGBA where anything says that it is transparent, else in any mode."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _deep_grey_to_8_bit(image)
    return image.convert("RGBA") if image.has_transparency_data else image


def _deep_grey_to_8_bit(image: Image.Image) -> Image.Image:
    """16- and 32-bit greyscale to 8 bits. PIL's own `convert` clips everything above 255 to white."""
    values = np.asarray(image)
    if image.mode.startswith("I;16"):
        grey = Image.fromarray((values >> 8).astype(np.uint8))
        if "transparency" in image.info:  # the value that is transparent
            grey.putalpha(Image.fromarray((values != image.info["transparency"]) * np.uint8(255)))
        return grey
    values = values.astype(np.float64)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    if image.mode == "F" and low >= 0 and high <= 1:
        values = values * 255
    elif low >= 0 and high <= 255:
        pass
    elif low >= 0 and high <= 65535:
        values = values / 257
    else:
        values = (values - low) * (255 / ((high - low) or 1.0))
    return Image.fromarray(values.round().astype(np.uint8))


# ---- image processors ----


def pil_image_processor(image_processor):
    """The PIL form of an image processor, whose pixel values are the authors'; unchanged if it has none."""
    name = type(image_processor).__name__.removesuffix("Fast")
    # transformers 5 has `NamePil` beside `Name` (torchvision), 4.57 `Name` (PIL) beside `NameFast`
    form = getattr(transformers, name + "Pil", None) or getattr(transformers, name, None)
    if form is None or isinstance(image_processor, form):
        return image_processor
    return form.from_dict(image_processor.to_dict())


def pair_of(size) -> tuple[int, int] | None:
    return (size, size) if isinstance(size, int) else tuple(size) if size is not None else None


def output_size(image_processor) -> tuple[int, int] | None:
    """Height and width of the images that an image processor gives; `None` if they vary."""
    name = "crop_size" if getattr(image_processor, "do_center_crop", False) else "size"
    size = dict(getattr(image_processor, name, None) or {})
    return (size["height"], size["width"]) if size.get("height") and size.get("width") else None


def portable_image_processor_config(config: dict) -> None:
    for name in ("image_processor_type", "image_processor_class"):
        if isinstance(config.get(name), str):
            config[name] = config[name].removesuffix("Fast").removesuffix("Pil")
    config.pop("auto_map", None)  # the processor's, which transformers writes into its parts too


__all__ = [
    "DROPPED",
    "FORMATS",
    "LIMITS",
    "TRANSPARENCIES",
    "WHITE",
    "ImageLimits",
    "array_to_image",
    "image_size",
    "read_image",
    "shortened",
    "to_8_bit",
    "to_rgb",
    "with_alpha",
]
