"""A path, a Hub id or something in memory -> a `datasets.Dataset` or a list of records, not yet interpreted."""

import csv
import json
import os
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk


FILE_SUFFIXES = {".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow"}


def open_source(
    source: Any, split: str | None, name: str | None, revision: str | None
) -> tuple[Dataset | list[dict], Path | None]:
    """(what was opened, the folder that relative picture paths start from)."""
    if isinstance(source, (Dataset, DatasetDict)):
        return _one_split(source, split, "the data set"), None
    if isinstance(source, (list, tuple)):
        return list(source), None
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(f"A data source is a path, a Hub id, a Dataset or a list of dicts, not {type(source)}.")
    path = Path(source)
    if path.is_file():
        if split not in (None, "train"):
            raise ValueError(f"{source}: a single file has no split {split!r}; leave it out.")
        return _open_file(path), path.parent
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _one_split(load_from_disk(str(path)), split, str(path)), path
    elif path.suffix in FILE_SUFFIXES or path.is_absolute() or str(source).count("/") > 1 or str(source)[:1] in ".~":
        raise ValueError(f"{source}: no such file or folder.")
    try:
        loaded = load_dataset(str(source), name, split=split, revision=revision)
    except Exception as error:
        raise ValueError(f"{source}: `datasets` cannot load it ({type(error).__name__}: {error}).") from error
    return _one_split(loaded, None, str(source)), path if path.is_dir() else None


def _one_split(loaded: Dataset | DatasetDict, split: str | None, title: str) -> Dataset:
    if isinstance(loaded, Dataset):
        if split not in (None, "train", str(loaded.split)):
            raise ValueError(f"{title}: it is a single split, so there is no split {split!r}; leave it out.")
        return loaded
    chosen = split or ("train" if "train" in loaded or len(loaded) != 1 else next(iter(loaded)))
    if chosen not in loaded:
        raise ValueError(f"{title}: no split {chosen!r}; there are {', '.join(loaded)}.")
    return loaded[chosen]


def _open_file(path: Path) -> Dataset | list[dict]:
    suffix = path.suffix
    if suffix == ".parquet":
        return Dataset.from_parquet(str(path))
    if suffix == ".arrow":
        return Dataset.from_file(str(path))
    if suffix in (".csv", ".tsv"):
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ","))
    if suffix not in (".json", ".jsonl"):
        raise ValueError(f"{path}: unknown kind of file; accepted are {', '.join(sorted(FILE_SUFFIXES))}.")
    records, number = [], 0
    with path.open(encoding="utf-8") as file:
        try:
            if suffix == ".jsonl":
                for number, line in enumerate(file, 1):  # noqa: B007, the message below names it
                    if line.strip():
                        records.append(json.loads(line))
            else:
                records = json.load(file)
        except ValueError as error:
            where = f", line {number}" if suffix == ".jsonl" else ""
            raise ValueError(f"{path}{where}: not valid JSON ({error}).") from error
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{path}: expected a list of records (JSON) or a record a line (JSONL).")
    return records
