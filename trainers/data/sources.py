"""A path, a Hub id or something in memory -> a `datasets` data set or plain records, not yet interpreted."""

import codecs
import csv
import glob
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ijson
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    IterableDatasetDict,
    Value,
    load_dataset,
    load_from_disk,
)


READ = 1 << 12  # bytes in which a JSON file has to begin
# Shards of a data set in memory or on disk that is streamed: how many loader processes can share it.
NUM_SHARDS = 64
WEBDATASET_IMAGES = ("jpg", "jpeg", "png", "webp")


@dataclass(frozen=True)
class Records:
    """
    The records of JSON, JSONL, CSV or TSV files, read one after the other: no file is ever held whole.

    Attributes:
        paths: the files, all of one kind.
    """

    paths: tuple[Path, ...]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for path in self.paths:
            yield from read_records(path)


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of one JSON, JSONL, CSV or TSV file; raises ValueError naming file and place."""
    try:
        yield from READERS[path.suffix](path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}).") from error


def open_source(
    source: Any, split: str | None, name: str | None, revision: str | None, streaming: bool = False
) -> tuple[Dataset | IterableDataset | Records | list[dict], Path | None]:
    """
    Opens what a user names.

    Args:
        source: a file, a pattern such as `parts/*.parquet`, a folder, a Hub id, or something in memory.
        split: which split, where there are several.
        name: configuration of a Hub data set.
        revision: revision of a Hub data set.
        streaming: read on the way where that is possible, without a local copy.

    Returns:
        What was opened, and the folder that relative image paths start from.

    Raises:
        ValueError: naming the source, where it cannot be opened.
    """
    if isinstance(source, (Dataset, DatasetDict, IterableDataset, IterableDatasetDict)):
        return _one_split(source, split, "the data set"), None
    if isinstance(source, (list, tuple)):
        return list(source), None
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(f"A data source is a path, a Hub id, a Dataset or a list of dicts, not {type(source)}.")
    path = Path(source)
    paths = _files(path)
    if paths:
        if split not in (None, "train"):
            raise ValueError(f"{source}: files named one by one have no split {split!r}; leave it out.")
        return _open_files(paths, streaming), Path(os.path.commonpath([str(path.parent) for path in paths]))
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _one_split(load_from_disk(str(path)), split, str(path)), path
    elif path.suffix in FILE_SUFFIXES or path.is_absolute() or str(source).count("/") > 1 or str(source)[:1] in ".~":
        raise ValueError(f"{source}: no such file or folder.")
    try:
        # streamed, a split is chosen by key: the same error then names those that there are
        loaded = load_dataset(
            str(source), name, split=None if streaming else split, revision=revision, streaming=streaming
        )
        opened = _one_split(loaded, split if streaming else None, str(source))
    except Exception as error:
        raise ValueError(f"{source}: `datasets` cannot load it ({type(error).__name__}: {error}).") from error
    return _from_webdataset(opened), path if path.is_dir() else None


def _from_webdataset(opened: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """
    Rows of WebDataset tars as `id`, `image` and `caption`; other data as it is. Of img2dataset's layout (key.jpg,
    key.txt, key.json) the text is read, else the `caption` of the JSON.
    """
    columns = opened.column_names or list(next(iter(opened), {}))
    if "__key__" not in columns:
        return opened
    image = next((suffix for suffix in WEBDATASET_IMAGES if suffix in columns), None)
    if image is None or not {"txt", "json"} & set(columns):
        raise ValueError(
            f"This WebDataset has the columns {', '.join(columns)}: it must hold for each key an image "
            f"({', '.join(WEBDATASET_IMAGES)}) and a text (txt, or json with a caption)."
        )
    if "txt" not in columns:
        # typed, because images would be decoded to find the type
        features = Features({image: Image(), "__key__": Value("string"), "txt": Value("string")})
        opened = opened.select_columns(["__key__", image, "json"]).map(
            lambda row: {"txt": (row["json"] or {}).get("caption")}, remove_columns="json", features=features
        )
    names = {"__key__": "id", image: "image", "txt": "caption"}
    return opened.select_columns(list(names)).rename_columns(names)


def _files(path: Path) -> list[Path]:
    """The files that a path or pattern names, in order of their names; none for a folder or a Hub id."""
    if path.is_file():
        return [path]
    if not glob.has_magic(str(path)):
        return []
    found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if os.path.isfile(name)]
    if not found:
        raise ValueError(f"{path}: no file fits this pattern.")
    suffixes = {file.suffix for file in found}
    if len(suffixes) > 1:
        raise ValueError(f"{path}: files of several kinds fit this pattern ({', '.join(sorted(suffixes))}).")
    return found


def _one_split(loaded: Any, split: str | None, title: str) -> Dataset | IterableDataset:
    if isinstance(loaded, (Dataset, IterableDataset)):
        if split not in (None, "train", str(loaded.split)):
            raise ValueError(f"{title}: it is a single split, so there is no split {split!r}; leave it out.")
        return loaded
    chosen = split or ("train" if "train" in loaded or len(loaded) != 1 else next(iter(loaded)))
    if chosen not in loaded:
        raise ValueError(f"{title}: no split {chosen!r}; there are {', '.join(loaded)}.")
    return loaded[chosen]


def _open_files(paths: list[Path], streaming: bool) -> Dataset | IterableDataset | Records:
    suffix, names = paths[0].suffix, [str(path) for path in paths]
    if suffix not in FILE_SUFFIXES:
        raise ValueError(f"{paths[0]}: unknown kind of file; accepted are {', '.join(sorted(FILE_SUFFIXES))}.")
    if suffix in READERS:
        return Records(tuple(paths))
    try:
        if suffix == ".parquet":
            # row groups become shards, so that several loader processes can read one file
            return Dataset.from_parquet(names, streaming=True).reshard() if streaming else Dataset.from_parquet(names)
        kind = "webdataset" if suffix == ".tar" else "arrow"
        opened = load_dataset(kind, data_files={"train": names}, split="train", streaming=streaming)
    except Exception as error:
        cause = error.__cause__ or error
        raise ValueError(f"{', '.join(names[:3])}: not readable as {suffix[1:]} ({cause}).") from error
    return _from_webdataset(opened)


def _array_records(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a JSON array one by one, by a strict parser."""
    refused = f"{path}: expected a list of records (JSON) or a record a line (JSONL)"
    number = 0
    with path.open("rb") as file:
        begin = file.read(READ).removeprefix(codecs.BOM_UTF8).lstrip()
        if not begin.startswith(b"["):
            raise ValueError(f"{refused}.")
        file.seek(0)
        if file.read(3) != codecs.BOM_UTF8:
            file.seek(0)
        try:
            for record in ijson.items(file, "item", use_float=True):
                if not isinstance(record, dict):
                    raise ValueError(f"{refused}; record {number} is {str(record)[:20]!r}.")
                yield record
                number += 1
        except ijson.JSONError as error:
            problem = str(error).strip().splitlines()[0]
            raise ValueError(f"{path}, record {number}: not valid JSON ({problem}).") from error


def _line_records(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not valid JSON ({error}).") from error
            if not isinstance(record, dict):
                raise ValueError(
                    f"{path}, line {number}: expected a list of records (JSON) or a record a line (JSONL)."
                )
            yield record


def _table_records(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")


READERS: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {
    ".json": _array_records,
    ".jsonl": _line_records,
    ".csv": _table_records,
    ".tsv": _table_records,
}
FILE_SUFFIXES = {*READERS, ".parquet", ".arrow", ".tar"}
