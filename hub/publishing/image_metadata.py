"""Images without what stands beside their pixels: EXIF with its GPS, comments, text, profiles, bytes behind the end."""

import io
from pathlib import Path

from PIL import Image, ImageOps

from modeling_aligngpt.images_aligngpt import LIMITS, read_image


SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif"}
_ORIENTATION, _GPS = 0x0112, 0x8825
_PNG_MODES = {"1", "L", "LA", "I;16", "P", "RGB", "RGBA"}


def without_metadata(data: bytes) -> bytes:
    """
    The same pixels and nothing else: a JPEG's own, not compressed again; other formats' first frame as PNG.

    Args:
        data: an encoded image of an accepted format.

    Raises:
        ValueError, OSError: it cannot be decoded.
    """
    read_image(data)
    if data[:2] == b"\xff\xd8":
        return _bare_jpeg(data)
    with Image.open(io.BytesIO(data), formats=LIMITS.formats) as opened:
        image = ImageOps.exif_transpose(opened)
        image.load()
    if image.mode not in _PNG_MODES:
        image = read_image(data)
    image.info = {name: value for name, value in image.info.items() if name == "transparency"}
    written = io.BytesIO()
    image.save(written, "PNG")
    return written.getvalue()


def _bare_jpeg(data: bytes) -> bytes:
    """A JPEG's tables and scans up to its end; of its EXIF data only which way is up."""
    with Image.open(io.BytesIO(data)) as image:
        orientation = image.getexif().get(_ORIENTATION, 1)
    kept = [data[:2]]
    if orientation in range(2, 9):
        exif = Image.Exif()
        exif[_ORIENTATION] = orientation
        written = exif.tobytes()
        kept.append(b"\xff\xe1" + (len(written) + 2).to_bytes(2, "big") + written)
    place = 2
    # JFIF's (0xE0) and Adobe's segment (0xEE) say how colours are stored, the others and comments who, where and when
    while place + 4 <= len(data):
        if data[place] != 0xFF:
            raise ValueError("its JPEG segments are damaged")
        marker = data[place + 1]
        if marker == 0xFF:  # padding
            place += 1
            continue
        if marker == 0xD9:
            break
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if marker == 0xDA:
            end = _end_of_scan(data, end)
        if marker == 0xE0:
            # a thumbnail may stand in it: only the 16 bytes of the header, which has none
            kept.append(data[place : place + 2] + b"\x00\x10" + data[place + 4 : place + 16] + b"\x00\x00")
        elif marker == 0xEE or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept.append(data[place:end])
        place = end
    return b"".join([*kept, b"\xff\xd9"])


def _end_of_scan(data: bytes, place: int) -> int:
    """Where the next segment begins: 0xFF in a scan's data is followed by 0, or by a restart's number."""
    while (place := data.find(b"\xff", place)) >= 0 and place + 1 < len(data):
        if data[place + 1] != 0 and not 0xD0 <= data[place + 1] <= 0xD7:
            return place
        place += 2
    return len(data)


def texts_of_image(data: bytes) -> str:
    """What an image says besides its pixels: PNG's text, comments, EXIF, XMP."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()  # PNG text may stand behind the pixels
            said = {str(key): value for key, value in image.info.items()}
            exif = image.getexif()
            said |= {str(key): value for key, value in exif.items()}
    except (OSError, ValueError, SyntaxError):
        return ""
    lines = (value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value) for value in said.values())
    return "\n".join(lines)


def has_place(data: bytes) -> bool:
    """Whether an image says where on Earth it was taken."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return bool(image.getexif().get_ifd(_GPS))
    except (OSError, ValueError, SyntaxError):
        return False


def is_image(path: Path) -> bool:
    """Whether a file's name is that of an image."""
    return path.suffix.lower() in SUFFIXES
