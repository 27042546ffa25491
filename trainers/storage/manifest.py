"""
`manifest.json` of a checkpoint: which files it holds, how large, and the headers of their tensors; so that damage is
named, and an earlier checkpoint used, before anything is read into a model.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aligngpt_shared.files import sync_file, sync_folder


MANIFEST_NAME = "manifest.json"
# files up to this size have their digest taken always; larger ones where asked (80 GB take minutes)
SMALL = 64 * 2**20


def write_manifest(folder: Path, digests: bool = False) -> None:
    """Describes all files of a folder and makes sure that they are on the disk."""
    files = {}
    for path in _files(folder):
        facts: dict[str, Any] = {"size": path.stat().st_size}
        if path.suffix == ".safetensors":
            facts["header"] = _header(path)
        if digests or facts["size"] <= SMALL:
            facts["sha256"] = _digest(path)
        files[path.relative_to(folder).as_posix()] = facts
        sync_file(path)
    target = folder / MANIFEST_NAME
    target.write_text(json.dumps({"version": 1, "files": files}, indent=1), encoding="utf-8")
    sync_file(target)
    sync_folder(folder)
    sync_folder(folder.parent)


def damage(folder: str | os.PathLike) -> str | None:
    """What is wrong with a checkpoint, with the file's name; `None` for a whole one."""
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return f"{MANIFEST_NAME} is missing: the save was cut off"
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        items = list(files.items())
    except (ValueError, KeyError, AttributeError, TypeError):
        return f"{MANIFEST_NAME} cannot be read"
    for name, facts in items:
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != facts["size"]:
            return f"{name} has {file.stat().st_size:,} bytes, {facts['size']:,} were written"
        if "header" in facts and _header(file) != facts["header"]:
            return f"{name} has another header than was written"
        if "sha256" in facts and _digest(file) != facts["sha256"]:
            return f"{name} is not what was written (its digest differs)"
    return None


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST_NAME)


def _header(path: Path) -> str | None:
    """SHA-256 of a safetensors header (names, shapes, dtypes, places); `None` where it does not fit the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= size - 8:
            return None
        header = file.read(length)
    try:
        ends = [entry["data_offsets"][1] for name, entry in json.loads(header).items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return hashlib.sha256(header).hexdigest() if 8 + length + max(ends, default=0) == size else None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
