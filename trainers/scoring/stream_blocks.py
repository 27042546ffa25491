"""Blocks of a stream: each is read once, spooled to disk with its images still encoded, and scored from there.

A stream consists of parts (its files), read one after the other; block k of part p holds that part's rows from
k x shard_size on. The last block of a part is always shorter than the others (it may be empty), which is how a resumed
run knows that a part is finished. Processes share out whole parts where there are enough, else the blocks of each part.
"""

import logging
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from queue import Full, Queue
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image, IterableDataset, List, Value, concatenate_datasets
from datasets.download.streaming_download_manager import xopen
from huggingface_hub import HfApi

from modeling_aligngpt.images_aligngpt import shortened

from ..data.conversations import ROW_ERRORS, UNREADABLE, BadRow, reason_of
from ..data.load import RowReport
from ..data.records import IMAGE_COLUMNS, MESSAGES, convert_record, encode_images, name_of
from ..data.sources import Broken, Records, open_source, read_records
from ..data.streaming import with_features
from .config import ScoreConfig
from .processes import keeping_progress
from .source import Span, file_identity, spans_of


logger = logging.getLogger(__name__)

SPOOLED = Features(
    {
        "images": List(Image()),
        "messages": MESSAGES,
        "id": Value("string"),
        "reason": Value("string"),
    }
)
MOST_PARTS = 64  # however many files or row groups the stream has
ROWS_AT_ONCE = 128
AHEAD = 2  # spooled blocks that wait for the scorer
CONNECTIONS = 16


class RecordStream:
    """What a data source is as a stream: numbered parts of raw records, images undecoded.

    Args:
        config: `dataset` and its companions.

    Raises:
        ValueError: a source that does not exist or cannot be streamed.
    """

    def __init__(self, config: ScoreConfig):
        self.title, self.total = config.dataset, None
        if config.image_folder and not os.path.isdir(config.image_folder):
            raise ValueError(f"image_folder {config.image_folder!r} does not exist or is not a folder.")
        self.revision = config.dataset_revision if os.path.exists(self.title) else _hub_revision(config)
        opened, folder = open_source(
            config.dataset, config.dataset_split, config.dataset_config, self.revision, streaming=True
        )
        self.folder = config.image_folder or folder
        self._files: tuple[Path, ...] = ()
        if isinstance(opened, Records):
            self._files, self.num_parts = opened.paths, len(opened.paths)
            return
        if isinstance(opened, Dataset):
            self.total = len(opened)
            opened = opened.to_iterable_dataset(num_shards=min(len(opened), MOST_PARTS) or 1)
        opened = with_features(opened)
        self._rows: IterableDataset = opened.decode(False)
        self.num_parts = max(1, min(MOST_PARTS, opened.num_shards))
        splits = opened.info.splits or {}
        if self.total is None and opened.split is not None and str(opened.split) in splits:
            self.total = splits[str(opened.split)].num_examples or None

    def records(self, part: int, start: int) -> Iterator[dict[str, Any]]:
        """The records of a part from row `start` on."""
        if self._files:
            yield from islice(read_records(self._files[part]), start, None)
            return
        rows = self._rows.shard(self.num_parts, part)
        yield from rows.skip(start) if start else rows

    def describe(self) -> dict[str, Any]:
        """What tells this data from other data: its name, revision, parts and columns; of a file also its time."""
        facts: dict[str, Any] = {"dataset": self.title, "dataset_revision": self.revision, "parts": self.num_parts}
        if self._files:
            facts["data"] = [file_identity(file).decode() for file in self._files]
        else:
            facts["columns"] = sorted(self._rows.features)
        return facts


def _hub_revision(config: ScoreConfig) -> str | None:
    """The commit that a Hub data set stands at, so that a resumed run reads the same rows."""
    try:
        return HfApi().dataset_info(config.dataset, revision=config.dataset_revision).sha
    except Exception:  # offline: what is cached has no newer revision either
        return config.dataset_revision


def _convert(record: dict[str, Any], folder: str | Path | None) -> dict[str, Any]:
    """A record -> a row of `SPOOLED`; what is wrong with it goes into `reason`."""
    name = name_of(record)
    row: dict[str, Any] = {"id": None if name is None else str(name), "images": [], "messages": [], "reason": None}
    try:
        images, problems = encode_images(_with_remote_images(record), folder, check=True)
        if problems:
            raise BadRow("; ".join(problems), UNREADABLE)
        messages, _ = convert_record(record, len(images))
        row["images"] = [{"bytes": image["bytes"], "path": image["path"]} for image in images]
        row["messages"] = [
            {"role": message["role"], "content": [{"text": None, **block} for block in message["content"]]}
            for message in messages
        ]
    except ROW_ERRORS as error:
        row["reason"] = reason_of(error).kept()
    return row


def _with_remote_images(record: dict[str, Any]) -> dict[str, Any]:
    """The record, its images that lie neither in the stream nor on this machine fetched."""
    column = next((name for name in IMAGE_COLUMNS if record.get(name) is not None), None)
    if column is None or isinstance(record, Broken):
        return record
    value = record[column]
    images = [_fetch(item) for item in (value if isinstance(value, (list, tuple)) else [value])]
    return {**record, column: images}


def _fetch(image: Any) -> Any:
    path = image.get("path") if isinstance(image, dict) and image.get("bytes") is None else image
    if not isinstance(path, str) or "://" not in path:
        return image
    try:
        with xopen(path, "rb") as file:
            return {"bytes": file.read(), "path": path.partition("::")[0].rpartition("/")[2]}
    except Exception as error:
        raise BadRow(
            f"image cannot be read (file {shortened(path)!r}): {type(error).__name__}: {shortened(error)}", UNREADABLE
        ) from error


def spool_block(records: Iterable[dict[str, Any]], folder: str | Path | None, target: Path) -> int:
    """Writes records as a block, whole or not at all; returns their number."""
    beside, written = target.with_suffix(".tmp"), 0
    records = iter(records)
    with (
        pa.OSFile(str(beside), "wb") as file,
        pa.ipc.new_stream(file, SPOOLED.arrow_schema) as writer,
        ThreadPoolExecutor(CONNECTIONS) as pool,
    ):
        while chunk := list(pool.map(partial(_convert, folder=folder), islice(records, ROWS_AT_ONCE))):
            writer.write_table(pa.Table.from_pylist(chunk, SPOOLED.arrow_schema))
            written += len(chunk)
    beside.replace(target)
    return written


class StreamSource:
    """Blocks of a stream, spooled to `folder` while earlier ones are scored.

    Args:
        stream: the records.
        folder: where blocks and scores are kept.
        shard_size: rows of a block.
    """

    def __init__(self, stream: RecordStream, folder: Path, shard_size: int):
        self.stream, self.folder, self.shard_size, self.total = stream, folder, shard_size, stream.total
        self.report = RowReport()
        self.facts = {"streaming": True, "dataset_revision": stream.revision}
        self._open: tuple[str, Dataset] | None = None

    def settings(self) -> dict[str, Any]:
        """What the data is, so that progress is not mixed with that of other data."""
        return self.stream.describe()

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "_open": None}  # workers only fetch

    def fetch(self, span: Span) -> tuple[list[dict[str, Any]], list[str | None]]:
        """(undecoded rows, what is wrong with each) of a batch."""
        if self._open is None or self._open[0] != span.block:
            self._open = span.block, Dataset.from_file(str(self._spool(span.block))).with_format("arrow")
        rows = self._open[1][span.start : span.stop].to_pylist() if span.stop > span.start else []
        return rows, [row.pop("reason") for row in rows]

    def blocks(self, folder: Path) -> list[str]:
        """Names of all finished blocks, in the order of their rows."""
        return sorted(path.stem for path in folder.glob("shard-*.parquet"))

    def spans(self, done: set[str], batch_size: int, rank: int, count: int) -> Iterator[Span]:
        """The batches of this process's blocks, but for `done` ones, as they become ready."""
        ready: Queue = Queue(AHEAD)
        stop = threading.Event()
        reader = threading.Thread(target=self._read_all, args=(done, rank, count, ready, stop), daemon=True)
        reader.start()  # at the first batch asked for: by then the workers have been forked
        try:
            while True:
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    return
                yield from spans_of(*item, batch_size)
        finally:
            stop.set()
            reader.join()

    def _read_all(self, done: set[str], rank: int, count: int, ready: Queue, stop: threading.Event):
        try:
            by_part = self.stream.num_parts >= count
            for part in range(rank, self.stream.num_parts, count) if by_part else range(self.stream.num_parts):
                for item in self._read_part(part, done, (0, 1) if by_part else (rank, count)):
                    if not _put(ready, item, stop):
                        return
            _put(ready, None, stop)
        except BaseException as error:
            _put(ready, error, stop)

    def _read_part(self, part: int, done: set[str], share: tuple[int, int]) -> Iterator[tuple[str, int]]:
        """(name, rows) of each block of a part that is this process's and not done, spooled."""
        number = 0
        while _name(part, number) in done:
            if self._is_last(part, number, done):
                return
            number += 1
        records = self.stream.records(part, number * self.shard_size)
        while True:
            block, name = islice(records, self.shard_size), _name(part, number)
            if number % share[1] == share[0] and name not in done:
                with keeping_progress(f"block {name}", self.folder):
                    rows = spool_block(block, self.stream.folder, self._spool(name))
                yield name, rows
            else:
                rows = sum(1 for _ in block)
            if rows < self.shard_size:
                return
            number += 1

    def _is_last(self, part: int, number: int, done: set[str]) -> bool:
        if _name(part, number) not in done:
            return False
        return pq.read_metadata(self.folder / f"{_name(part, number)}.parquet").num_rows < self.shard_size

    def _spool(self, block: str) -> Path:
        return self.folder / f"{block.replace('shard', 'rows')}.arrow"

    def all_rows(self, blocks: list[str]) -> Dataset:
        """The rows in the order of their scores, memory-mapped."""
        parts = [Dataset.from_file(str(self._spool(block))) for block in blocks]
        rows = concatenate_datasets([part for part in parts if len(part)] or parts[:1])
        if rows.data.column("id").null_count == len(rows):
            rows = rows.remove_columns("id")
        return rows.remove_columns("reason")

    def number(self, position: int) -> int:
        """The number in the source of a row."""
        return position

    def check_complete(self, folder: Path):
        """Raises where a block is missing between others or the end of a part was not reached."""
        finished = set(self.blocks(folder))
        for part in range(self.stream.num_parts):
            number = 0
            while not self._is_last(part, number, finished):
                if _name(part, number) not in finished:
                    raise ValueError(f"{_name(part, number)} of {folder} is missing: run the same command again.")
                number += 1


def _name(part: int, number: int) -> str:
    return f"shard-{part:05d}-{number:06d}"


def _put(queue: Queue, item: Any, stop: threading.Event) -> bool:
    """Puts an item unless nobody waits for it any more."""
    while not stop.is_set():
        try:
            queue.put(item, timeout=0.2)
            return True
        except Full:
            continue
    return False
