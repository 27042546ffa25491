"""
The one way to write a file or a folder: beside its place, onto the disk, then renamed. What was killed in between never
looks finished, and two that write the same output do not meet.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .locks import lock, lock_of


UNFINISHED = ".unfinished"


def write_file(path: str | os.PathLike, content: str | bytes) -> Path:
    """Writes a file in one step; an earlier one of that name stays until then."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}{UNFINISHED}")
    try:
        with beside.open("wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    return path


def write_json(path: str | os.PathLike, content: Any, indent: int = 2) -> Path:
    """As [`write_file`], with a line break at the end."""
    return write_file(path, json.dumps(content, indent=indent, ensure_ascii=False) + "\n")


@contextmanager
def new_folder(output: str | os.PathLike, replace: bool = False) -> Iterator[Path]:
    """
    A folder beside `output` to write into. It takes that name when the block ends without an error, and vanishes
    otherwise; what a killed run left is removed.

    Args:
        output: the folder to be.
        replace: an earlier one gives way at the end.

    Raises:
        ValueError: `output` exists and is no empty folder (unless `replace`), or another process writes it.
    """
    output = Path(output)
    occupied = output.exists() and (not output.is_dir() or any(output.iterdir()))
    if occupied and not replace:
        raise ValueError(f"output {str(output)!r} exists: choose another folder, or remove it.")
    if output.exists() and not output.is_dir():
        raise ValueError(f"Output {output} is a file: name a folder.")
    with lock(lock_of(output)):
        beside = output.with_name(f".{output.name}{UNFINISHED}")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        try:
            yield beside
            move_folder(beside, output)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise


def move_folder(source: Path, target: Path) -> None:
    """Renames a folder; one that stands there is moved away first and removed when the new one is in its place."""
    old = target.with_name(f".{target.name}.old{UNFINISHED}")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(source, target)
    sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Puts the names in a folder on the disk, so that a rename outlives a power failure; nothing on Windows."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def read_json(path: Path) -> dict:
    """A JSON object from a file; a `ValueError` that names the file otherwise."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object.")
    return content
