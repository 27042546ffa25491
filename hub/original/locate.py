"""Folders that a conversion reads: on disk, or from the Hub."""

import os
from pathlib import Path

from huggingface_hub import snapshot_download

from aligngpt_shared.references import is_hub_id
from aligngpt_shared.weights import find_weight_files


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
    if is_hub_id(text):
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
