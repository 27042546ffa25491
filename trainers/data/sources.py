"""A path, a Hub id or something in memory -> a `datasets` data set or plain records, not yet interpreted."""

import codecs
import csv
import glob
import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

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

from .archives import HOLDS, PICTURES, coco_records, folder_records, has_texts_beside, tar_records
from .columns import mapping_of, names_in, refuse_unknown, renamed, under_our_names
from .conversations import TOO_DEEP, Broken


READ = 1 << 16  # characters of a JSON array that are read at a time
DECODER = json.JSONDecoder()
SPACE = re.compile(r"[ \t\r\n]*")
LONGEST_WORD = 16  # of JSON outside its texts, such as -Infinity: what an end of the text read so far can cut
PART = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[^"\[\]{}]+|[\[\]{}]', re.DOTALL)
WANTED = "expected a list of records (JSON) or a record a line (JSONL)"
# Shards of a data set in memory or on disk that is streamed: how many loader processes can share it.
NUM_SHARDS = 64


@dataclass(frozen=True)
class Records:
    """
    The records of JSON, JSONL, CSV or TSV files, read one after the other: no file is ever held whole.

    Attributes:
        paths: the files, all of one kind.
        columns: their names of columns, by ours.
    """

    paths: tuple[Path, ...]
    columns: dict[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for path in self.paths:
            yield from self.read(path)

    def read(self, path: Path) -> Iterator[dict[str, Any]]:
        """The records of one of the files, see [`read_records`], under our names."""
        for record in read_records(path):
            yield renamed(record, self.columns) if self.columns and not isinstance(record, Broken) else record


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """
    The records of one JSON, JSONL, CSV or TSV file, tar, or folder of pictures. Bytes that are not UTF-8 stay
    in the texts, as lone surrogates.

    Raises:
        ValueError: naming file and place, where nothing behind a fault can be read. A fault that costs one record gives
            a [`Broken`].
    """
    return folder_records(path) if path.is_dir() else READERS[path.suffix](path)


def _open_text(path: Path, newline: str | None = None) -> TextIO:
    with path.open("rb") as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise ValueError(f"{path}: not UTF-8 text but UTF-16: save it as UTF-8.")
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def open_source(
    source: Any,
    split: str | None,
    name: str | None,
    revision: str | None,
    streaming: bool = False,
    columns: Mapping[str, str] | str | None = None,
) -> tuple[Dataset | IterableDataset | Records | list[dict], Path | None]:
    """
    Opens what a user names.

    Args:
        source: a file, a pattern such as `parts/*.parquet`, a folder, a Hub id, or something in memory.
        split: which split, where there are several.
        name: configuration of a Hub data set.
        revision: revision of a Hub data set.
        streaming: read on the way where that is possible, without a local copy.
        columns: the source's names of columns, by ours.

    Returns:
        What was opened, under our names, and the folder that relative image paths start from.

    Raises:
        ValueError: naming the source, where it cannot be opened, or has no column of a name in `columns`.
    """
    names = mapping_of(columns)
    opened, folder = _open(source, split, name, revision, streaming)
    if not names:
        return opened, folder
    title = str(source) if isinstance(source, (str, os.PathLike)) else "the data set"
    if isinstance(opened, Records):
        refuse_unknown(names, names_in(opened), title)
        return replace(opened, columns=names), folder
    return under_our_names(opened, names, title), folder


def _open(
    source: Any, split: str | None, name: str | None, revision: str | None, streaming: bool
) -> tuple[Dataset | IterableDataset | Records | list[dict], Path | None]:
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
        if split in (None, "train") and name is None:
            # img2dataset's tars, beside which lie tables of what was downloaded
            tars = tuple(sorted(tar for tar in path.glob("*.tar") if tar.stem.isdigit()))
            if tars or has_texts_beside(path):
                return Records(tars or (path,)), path
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
    image = next((suffix for suffix in PICTURES if suffix in columns), None)
    if image is None or not {"txt", "json"} & set(columns):
        raise ValueError(f"This WebDataset has the columns {', '.join(columns)}: {HOLDS}.")
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
        return load_dataset("arrow", data_files={"train": names}, split="train", streaming=streaming)
    except Exception as error:
        cause = error.__cause__ or error
        raise ValueError(f"{', '.join(names[:3])}: not readable as {suffix[1:]} ({cause}).") from error


class _Ahead:
    """The text of a file from `place` on, read further where what is there does not hold a value whole."""

    def __init__(self, file: TextIO):
        self.file, self.text, self.place = file, "", 0

    def more(self) -> bool:
        left = self.text[self.place :]
        # as much again: a long value is not tried many times
        self.text, self.place = left + self.file.read(max(READ, len(left))), 0
        return len(self.text) > len(left)

    def next(self) -> str:
        """The next character that is no white space, "" at the end of the file; `place` stays in front of it."""
        while True:
            self.place = SPACE.match(self.text, self.place).end()
            if self.place < len(self.text) or not self.more():
                return self.text[self.place : self.place + 1]

    def value(self) -> Any:
        """The value at `place`, which moves behind it."""
        while True:
            try:
                value, self.place = DECODER.raw_decode(self.text, self.place)
                return value
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - LONGEST_WORD
                if not (cut and self.more()):
                    raise

    def pass_over(self) -> None:
        """Moves `place` behind the list or object that begins there, however deep."""
        depth = 0
        while True:
            part = PART.match(self.text, self.place)
            if part is not None:
                self.place = part.end()
                depth += (part[0] in "[{") - (part[0] in "]}")
                if depth == 0:
                    return
            elif not self.more():
                raise json.JSONDecodeError("a list or object is not closed", self.text, len(self.text))


def _array_records(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a JSON array one by one."""
    number = 0
    with _open_text(path) as file:
        text = _Ahead(file)
        begin = text.next()
        if begin == "{" and (found := coco_records(path)) is not None:
            yield from found
            return
        if begin != "[":
            raise ValueError(f"{path}: {WANTED}.")
        text.place += 1
        separator = "," if text.next() != "]" else "]"
        text.place += separator == "]"
        try:
            while separator == ",":
                text.next()
                try:
                    record = text.value()
                except RecursionError:
                    text.pass_over()
                    record = Broken(f"{path}, record {number}: {TOO_DEEP}")
                if not isinstance(record, dict):
                    raise ValueError(f"{path}: {WANTED}; record {number} is {str(record)[:20]!r}.")
                yield record
                number += 1
                separator = text.next()
                if separator not in (",", "]"):
                    raise json.JSONDecodeError("Expecting ',' or ']'", text.text, text.place)
                text.place += 1
            if text.next():
                raise json.JSONDecodeError("trailing garbage", text.text, text.place)
        except json.JSONDecodeError as error:
            near = error.doc[error.pos : error.pos + 20]
            place = f"before {near!r}" if near else "at the end of the file"
            raise ValueError(
                f"{path}, record {number}: not valid JSON ({error.msg} {place}). What follows cannot be read: repair "
                "the file."
            ) from error


def _line_records(path: Path) -> Iterator[dict[str, Any]]:
    with _open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                problem = WANTED
            except ValueError as error:
                record, problem = None, f"not valid JSON ({error})"
            except RecursionError:
                record, problem = None, TOO_DEEP
            yield record if isinstance(record, dict) else Broken(f"{path}, line {number}: {problem}")


def _table_records(path: Path) -> Iterator[dict[str, Any]]:
    """
    Records of CSV or TSV, read strictly: otherwise a quote that is not closed swallows rows without a word. Where one
    breaks a row, that row is its first line, and what it took in besides is read once more.
    """
    mark = "\t" if path.suffix == ".tsv" else ","
    again: deque[str] = deque()
    taken: list[str] = []

    def lines() -> Iterator[str]:
        while line := again.popleft() if again else file.readline():
            taken.append(line)
            yield line

    with _open_text(path, newline="") as file:
        header: list[str] | None = None
        place, reader = 1, csv.reader(lines(), delimiter=mark, strict=True)
        while True:
            place += len(taken)
            taken.clear()
            where = f"{path}, line {place}"
            try:
                fields = next(reader, None)
            except csv.Error as error:
                again.extendleft(reversed(taken[1:]))
                del taken[1:]
                reader = csv.reader(lines(), delimiter=mark, strict=True)
                if header is None:
                    raise ValueError(f"{where}: the header cannot be read ({error}).") from error
                yield Broken(f"{where}: a quote is not closed, or stands within a text and is not doubled ({error})")
                continue
            if fields is None:
                return
            if not fields:
                continue
            if header is None:
                header = fields
                if twice := [name for name in header if name and header.count(name) > 1]:
                    raise ValueError(f"{path}: the header names {twice[0]!r} twice: rename one of them.")
            else:
                record = {**dict.fromkeys(header), **dict(zip(header, fields, strict=False))}
                if any(fields[len(header) :]):
                    quoted = "a tab" if mark == "\t" else "a comma"
                    number = f"{len(fields)} fields where the header has {len(header)}"
                    yield Broken(f"{where}: {number} (a text that holds {quoted} stands in quotes)", record)
                else:
                    yield record


READERS: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {
    ".json": _array_records,
    ".jsonl": _line_records,
    ".csv": _table_records,
    ".tsv": _table_records,
    ".tar": tar_records,
}
FILE_SUFFIXES = {*READERS, ".parquet", ".arrow"}
