"""Pictures with texts beside them: tars of WebDataset, folders, what img2dataset writes; and COCO's captions."""

import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .conversations import Broken


PICTURES = ("jpg", "jpeg", "png", "webp")
HOLDS = (
    f"it must hold for each key an image ({', '.join(PICTURES)}) and a text (txt, or json with a caption or messages)"
)
FROM_JSON = ("messages", "conversations", "texts", "caption", "captions")  # the first that is there


def tar_records(path: Path) -> Iterator[dict[str, Any]]:
    """
    The keys of a WebDataset's tar, each a record of `id`, `image` and `caption` or messages; its JSON is kept as
    `json`. What is broken costs its key.

    Raises:
        ValueError: for a file that is no tar.
    """
    key, members = "", {}
    try:
        with tarfile.open(path) as tar:
            for entry in tar:
                folder, name = os.path.split(entry.name)
                stem, _, suffix = name.partition(".")
                if not entry.isfile() or not stem or not suffix:
                    continue
                if members and key != os.path.join(folder, stem):
                    yield _record(path, key, members)
                    members = {}
                key = os.path.join(folder, stem)
                members[suffix.lower()] = tar.extractfile(entry).read()
            # a header that breaks off ends a tar without an error
            cut = "no whole header" if tar.fileobj.seek(0, os.SEEK_END) % tarfile.BLOCKSIZE else None
    except (tarfile.TarError, EOFError, OSError) as error:
        if not key:
            raise ValueError(f"{path}: not readable as tar ({error}).") from error
        cut, members = error, {}
    if members:
        yield _record(path, key, members)
    if cut:
        yield Broken(f"{path}: the archive is cut or damaged at key {key} ({cut})")


def folder_records(path: Path) -> Iterator[dict[str, Any]]:
    """The pictures in a folder and those below, each with the `.txt` (or `.json`) of its name."""
    for folder, below, names in os.walk(path):
        below.sort()
        keys: dict[str, dict[str, Path]] = {}
        for name in sorted(names):
            stem, _, suffix = name.rpartition(".")
            keys.setdefault(stem, {})[suffix.lower()] = Path(folder, name)
        for stem, members in keys.items():
            if not set(PICTURES).isdisjoint(members):
                yield _record(path, os.path.relpath(os.path.join(folder, stem), path), members)


def has_texts_beside(path: Path) -> bool:
    """Whether a folder holds a picture with a text beside it."""
    return any(
        text.with_suffix(f".{suffix}").is_file()
        for text in path.rglob("*.txt")
        for suffix in (*PICTURES, *map(str.upper, PICTURES))
    )


def coco_records(path: Path) -> Iterator[dict[str, Any]] | None:
    """The captions of one of COCO's `captions_*.json`, a record each; None for another file."""
    try:
        held = json.loads(path.read_bytes().decode("utf-8-sig", "surrogateescape"))
    except (ValueError, RecursionError):
        return None
    if not all(isinstance(held.get(name), list) for name in ("images", "annotations")):
        return None
    files = {image.get("id"): image.get("file_name") for image in held["images"]}
    return (
        {"id": each.get("id"), "image": files.get(each.get("image_id")), "caption": each.get("caption")}
        for each in held["annotations"]
    )


def _record(path: Path, key: str, members: dict[str, Any]) -> dict[str, Any]:
    """The record of a key, of its members by their endings: bytes, or paths of files."""
    record: dict[str, Any] = {"id": key}
    image = next((members[suffix] for suffix in PICTURES if suffix in members), None)
    if image is None or not {"txt", "json"} & set(members):
        return Broken(f"{path}, key {key}: {HOLDS}", record)
    record["image"] = os.path.abspath(image) if isinstance(image, Path) else image
    if "json" in members:
        try:
            record["json"] = facts = json.loads(_text(members["json"]))
            record.update({name: facts[name] for name in FROM_JSON if facts.get(name)})
        except (ValueError, AttributeError, RecursionError) as error:
            return Broken(f"{path}, key {key}: its json is no JSON object ({error})", record)
    if "txt" in members:
        record["caption"] = _text(members["txt"]).strip()
    return record


def _text(member: bytes | Path) -> str:
    content = member.read_bytes() if isinstance(member, Path) else member
    return content.decode("utf-8-sig", "surrogateescape")
