"""Folders of the Hub at one revision, and the records that lie in them."""

import json
import os
from pathlib import Path
from typing import Any

from aligngpt_shared.references import is_hub_id


# Formats of other libraries and copies of the same weights, which transformers does not read.
NOT_NEEDED = ["*.h5", "*.msgpack", "*.onnx", "*.ot", "*.gguf", "*.pth", "original/*", "onnx/*", "openvino/*", "*.md"]


def at_revision(source: str, revision: str | None, what: str) -> str:
    """
    A local copy of a Hub repository at a revision (what transformers' cache holds), or `source` without one.

    Raises:
        ValueError: a revision of a local folder.
    """
    if revision is None:
        return source
    if os.path.exists(source):
        raise ValueError(f"{what}_revision={revision!r} has no effect on the folder {source}: leave it out.")
    return _snapshot(source, revision)


def _snapshot(source: str, revision: str | None) -> str:
    from huggingface_hub import constants, list_repo_files, snapshot_download

    if constants.HF_HUB_OFFLINE:
        return snapshot_download(source, revision=revision, local_files_only=True)
    skip = list(NOT_NEEDED)
    if any(name.endswith(".safetensors") for name in list_repo_files(source, revision=revision)):
        skip.append("*.bin")
    return snapshot_download(source, revision=revision, ignore_patterns=skip)


def local_copy(source: str | os.PathLike) -> Path:
    """A folder as it is, or the local copy of a repository on the Hub; without a network, what its cache holds."""
    return Path(source if os.path.isdir(source) else _snapshot(os.fspath(source), None))


def find_record(source: str | None, name: str, revision: str | None = None, kind: str = "model") -> dict | None:
    """
    A JSON file that lies with a model or data set, in a folder or on the Hub; `None` where there is none.

    Args:
        source: folder or Hub id.
        name: of the file.
        revision: of a repository on the Hub.
        kind: `"model"` or `"dataset"`.
    """
    if source is None or os.path.isfile(source):
        return None
    if os.path.isdir(source):
        path = Path(source, name)
        return _read(path) if path.is_file() else None
    if not is_hub_id(source):
        return None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return _read(Path(hf_hub_download(source, name, revision=revision, repo_type=kind)))
    # offline, not there, not allowed: a record is good to have and no reason to stop
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError):
        return None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
