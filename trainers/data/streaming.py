"""Rows of data sets that are read on the way: the same conversion as `load.py`, one row at a time, and its counts."""

import logging
import os
from collections.abc import Iterator
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, Image, IterableDataset, List
from torch.utils.data import get_worker_info

from .columns import IMAGE_COLUMNS, PEEK, with_features
from .conversations import ROW_ERRORS, UNREADABLE, BadRow, Broken, captions_apart, reason_of
from .images import load_image
from .records import (
    MESSAGES,
    OPTIONAL,
    USED_COLUMNS,
    check_columns,
    convert_record,
    encode_images,
    has_image,
    left_encoded,
    name_of,
)
from .sources import NUM_SHARDS, Records


logger = logging.getLogger(__name__)

MAX_WORKERS = 256
ROWS_AT_ONCE = 1  # a bad row stops the stream when its turn comes, not before


class StreamCounts:
    """
    Counts that the data loader's processes share: rows read, left out and cut, with a warning at the 1st, 10th, 100th,
    ... row that is left out or cut in a process. Rows read ahead of training count, and each pass counts anew.

    Args:
        title: how messages name the stream.
    """

    KINDS = ("rows_read", "rows_left_out", "rows_cut")

    def __init__(self, title: str):
        self.title = title
        # each process of the loader has a line of its own: additions from several would get lost
        self._counts = torch.zeros(MAX_WORKERS + 1, len(self.KINDS), dtype=torch.int64).share_memory_()

    def add(self, kind: str, number: int = 1, reason: str | None = None) -> None:
        """Counts rows; `reason` says what happened to the last of them."""
        worker = get_worker_info()
        cell = self._counts[0 if worker is None else 1 + worker.id % MAX_WORKERS]
        index = self.KINDS.index(kind)
        cell[index] += number
        total = int(cell[index])
        if reason is not None and str(total).strip("0") == "1":
            verb = "left out" if kind == "rows_left_out" else "cut"
            logger.warning("%s: %d row%s %s so far; the last: %s", self.title, total, "s"[: total > 1], verb, reason)

    def reset(self) -> None:
        """Sets the counts to zero, after the first rows were read for a check."""
        self._counts.zero_()

    def totals(self) -> dict[str, int]:
        """The counts of this process and its data loader's, those that are zero left out."""
        sums = self._counts.sum(0).tolist()
        return {kind: number for kind, number in zip(self.KINDS, sums, strict=True) if number}


class Passes(torch.utils.data.IterableDataset):
    """
    A stream that begins anew whenever it ends, each time in another order: for a trainer one long epoch, in which a
    continued run finds its place by counting batches.
    """

    def __init__(self, rows: IterableDataset):
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # one of its own: loader processes share the number of the pass
        rows = self.rows.with_format(None)
        for number in count():
            rows.set_epoch(number)
            row = None
            for row in rows:
                yield row
            if row is None:
                return


def stream_rows(
    opened: Dataset | IterableDataset | Records,
    title: str,
    folder: Path | str | None,
    *,
    check_images: bool = True,
    skip: bool = False,
    shuffle_buffer: int = 0,
    seed: int = 0,
) -> IterableDataset:
    """
    What was opened as a stream of rows; see [`load_rows`].

    Returns:
        An `IterableDataset` with the columns of `load_rows` that the source can fill. Its attribute `stream_counts`
        ([`StreamCounts`]) counts bad rows that are left out.

    Raises:
        ValueError: here for unknown columns; on the way for a bad row, unless `skip`.
    """
    counts = StreamCounts(title)
    if isinstance(opened, Dataset):
        if not len(opened):
            raise ValueError(f"{title}: no rows.")
        opened = opened.with_format(None).to_iterable_dataset(num_shards=min(NUM_SHARDS, len(opened)))
    if isinstance(opened, Records):
        rows = _from_records(opened, title, folder, check_images, skip, counts)
        rows = rows.shuffle(seed=seed, buffer_size=shuffle_buffer) if shuffle_buffer else rows
    else:
        rows = opened.shuffle(seed=seed, buffer_size=shuffle_buffer) if shuffle_buffer else opened
        rows = _from_stream(rows, title, folder, check_images, skip, counts)
    rows.stream_counts = counts
    return rows


def _features(columns: set[str]) -> Features:
    """Of the rows that a source with such columns gives."""
    found = {"id"} & columns | {"clip_score"} & columns
    if columns & {"align_level", "similarity"}:
        found.add("align_level")
    optional = {name: kind for name, kind in OPTIONAL.items() if name in found}
    return Features({"images": List(Image()), "messages": MESSAGES, **optional})


def _row(
    record: dict[str, Any], features: Features, folder: Path | str | None, check: bool, decode: bool
) -> dict[str, Any]:
    """One row; one of `ROW_ERRORS` where it cannot be used. `decode`: look whether its images can be read, too."""
    images, problems = encode_images(record, folder, check)
    if problems:
        raise BadRow("; ".join(problems), UNREADABLE)
    messages, found = convert_record(record, len(images))
    for column in ("clip_score", "align_level"):
        if column in features and column not in found and has_image(messages):
            raise BadRow(f"no {column}, which other rows have")
    if decode:
        for image in images:
            load_image(image)
    return {
        "images": images,
        "messages": messages,
        **{name: found.get(name) for name in features if name in OPTIONAL},
    }


def _refuse(counts: StreamCounts, name: str, reason: Exception, skip: bool) -> None:
    """Counts a row that cannot be used, or stops at it, in one line: of a loader's process no more arrives."""
    said = f"{name}: {reason_of(reason)}"
    if not skip:
        raise ValueError(
            f'{counts.title}: {said}. Correct it, or leave such rows out with on_bad_row="skip".'
        ) from reason
    counts.add("rows_left_out", reason=said)


def _from_records(
    records: Records, title: str, folder: Path | str | None, check: bool, skip: bool, counts: StreamCounts
) -> IterableDataset:
    """Each file is a shard: as many loader processes as files can work at once."""
    begin = list(islice(records, PEEK))
    columns = {column for record in begin if not isinstance(record, Broken) for column in record}
    if not columns:
        problems = [f" {record.problem}." for record in begin if isinstance(record, Broken)]
        raise ValueError(f"{title}: no rows.{problems[0] if problems else ''}")
    check_columns(columns, title)
    features = _features(columns)
    # not a closure: of one, `datasets` takes apart all the functions that it leads to
    generate = partial(
        _generate,
        features=features,
        folder=folder,
        check=check,
        skip=skip,
        counts=counts,
        records=records,
    )
    # a file and a number name a row where it has no id
    kinds = features if "id" in features else Features({**features, "id": OPTIONAL["id"]})
    return IterableDataset.from_generator(generate, kinds, {"paths": [str(path) for path in records.paths]})


def _generate(
    paths: list[str],
    *,
    features: Features,
    folder: Path | str | None,
    check: bool,
    skip: bool,
    counts: StreamCounts,
    records: Records,
) -> Iterator[dict[str, Any]]:
    """The rows of files that can be used; of several, names need the file's."""
    for path in paths:
        given = (each for record in records.read(Path(path)) for each in captions_apart(record))
        for number, record in enumerate(given):
            name = f"{os.path.basename(path)} row {number}" if len(records.paths) > 1 else f"row {number}"
            try:
                row = _row(record, features, folder, check, skip and check)
            except ROW_ERRORS as error:
                known = f" (id {name_of(record)!r})" if name_of(record) is not None else ""
                _refuse(counts, name + known, error, skip)
                continue
            yield row if row.get("id") is not None else {**row, "id": name}


def _from_stream(
    rows: IterableDataset, title: str, folder: Path | str | None, check: bool, skip: bool, counts: StreamCounts
) -> IterableDataset:
    rows = with_features(rows)
    columns = set(rows.column_names or [])
    check_columns(columns, title)
    features = _features(columns)
    used = USED_COLUMNS | set(IMAGE_COLUMNS)
    rows = left_encoded(rows.select_columns([name for name in rows.column_names if name in used]))

    def convert(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        converted: dict[str, list] = {name: [] for name in features}
        given = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
        numbered = ((index, each) for index, one in zip(indices, given, strict=True) for each in captions_apart(one))
        for index, record in numbered:
            try:
                row = _row(record, features, folder, check, skip and check)
            except ROW_ERRORS as error:
                known = name_of(record)
                name = f"row with id {known!r}" if known is not None else f"row {index} of its shard"
                _refuse(counts, name, error, skip)
                continue
            for column in features:
                converted[column].append(row[column])
        return converted

    converted = rows.map(
        convert, batched=True, batch_size=ROWS_AT_ONCE, with_indices=True, remove_columns=rows.column_names
    )
    # features given to `map` would be taken for those of finished values, and images would never be decoded
    return converted.cast(features)
