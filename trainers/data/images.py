"""Images of every kind, decoded to RGB the same way for scoring, training and tests."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from tqdm.auto import tqdm

from modeling_aligngpt.images_aligngpt import WHITE, read_image, shortened

from .conversations import UNREADABLE, BadRow


if TYPE_CHECKING:
    from datasets import Dataset  # `chat` reads images where it is not installed

AT_ONCE = 32  # rows that a thread decodes before it comes back
MOST_THREADS = 16  # beyond, they wait for Python itself


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
        row: the data set's row, for the error message, which then says what can be done, too.
        transparency: the processor's setting; without one, white.

    Returns:
        The image in mode RGB, fully loaded.

    Raises:
        ValueError: naming row, file and remedy, for an image that cannot be read.
    """
    try:
        return read_image(value, transparency=transparency)
    except Exception as error:
        reason = f"image cannot be read ({_describe(value)}): {type(error).__name__}: {error}"
        if row is not None:
            reason = f'row {row}: {reason}. Repair or remove the file, or leave such rows out with on_bad_row="skip".'
        raise BadRow(reason, UNREADABLE) from error


def usable_cores() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def decode_images(rows: "Dataset", numbers: Sequence[int]) -> Iterator[tuple[int, list[tuple[int, int]], list[str]]]:
    """
    Decodes the images of rows once, to see whether they can be read, on this process's share of the cores.

    Args:
        rows: with a column `images`.
        numbers: which of them.

    Yields:
        (number, sizes of its images that can be read, what is wrong with the others), in the order of `numbers`.
    """
    images = rows.select_columns(["images"]).with_format("arrow")  # as they are stored

    def decode(some: Sequence[int]) -> list[tuple[int, list[tuple[int, int]], list[str]]]:
        found = []
        for number in map(int, some):
            sizes, problems = [], []
            for image in images[number]["images"].to_pylist()[0] or []:
                try:
                    sizes.append(load_image(image).size)
                except ValueError as error:
                    problems.append(str(error))
            found.append((number, sizes, problems))
        return found

    tasks = [numbers[start : start + AT_ONCE] for start in range(0, len(numbers), AT_ONCE)]
    cores = usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    with (
        ThreadPoolExecutor(min(MOST_THREADS, max(1, cores))) as pool,
        tqdm(total=len(numbers), desc="Decoding images", unit="row", delay=2) as bar,
    ):
        for found in pool.map(decode, tasks):
            yield from found
            bar.update(len(found))


def resolve_path(path: str, folder: str | Path | None) -> str:
    """`path` below `folder` unless it is absolute (or there is no folder)."""
    return path if folder is None or os.path.isabs(path) else os.path.join(folder, path)
