"""Folders that commands read (on disk or from the Hub) and write (whole, or not at all)."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download

from .original_format import find_weight_files


_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@contextmanager
def new_folder(output: str | os.PathLike) -> Iterator[Path]:
    """
    A temporary folder beside `output` that takes its name when all went well and vanishes otherwise.

    Raises:
        ValueError: `output` exists and is no empty folder.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"Output {output} exists and is not empty: name another folder or remove it.")
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))
    try:
        yield folder
        folder.chmod(0o755)
        os.replace(folder, output)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def stays_inside(path: Path, folder: Path) -> bool:
    """
    Whether a file is one of a folder's own: no link out of it, but for those from a snapshot of the Hub's cache to
    where that keeps its files.
    """
    target, folder = path.resolve(), folder.resolve()
    inside = target.is_relative_to(folder)
    return inside or (folder.parent.name == "snapshots" and target.is_relative_to(folder.parents[1] / "blobs"))


def locate(reference: str | os.PathLike, role: str, near: Path | None = None) -> Path:
    """
    A path on disk for a folder, or for a Hub id, whose files are downloaded.

    Args:
        reference: path or Hub id.
        role: what it is, for messages.
        near: a folder in and beside which relative paths are looked for as well.

    Raises:
        ValueError: neither is there.
    """
    text = os.fspath(reference)
    roots = [Path()] if near is None else [Path(), near, near.resolve().parent]
    for root in roots:
        if text and (root / text).exists():
            return root / text
    if _HUB_ID.fullmatch(text):
        return _download(text)
    raise ValueError(f"The {role} {text!r} is neither a folder here nor a Hub id.")


def _download(hub_id: str) -> Path:
    """Configs, tokenizer and weights of a Hub repository; pickled weights only where there are no safetensors."""
    patterns = ["*.json", "tokenizer.model", "*.safetensors"]
    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=patterns, ignore_patterns="consolidated*"))
        if not find_weight_files(folder):
            folder = Path(snapshot_download(hub_id, allow_patterns=[*patterns[:2], "*.bin"]))
    except Exception as error:
        raise ValueError(f"{hub_id!r} is no folder here, and the Hub does not give it: {error}") from error
    return folder
