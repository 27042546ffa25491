"""The pairs to score as blocks of rows.

A block is what one shard file of scores stands for. Workers fetch spans of a block as Arrow, decode and prepare them.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset

from ..data.conversations import Reason, caption_of, reason_of
from ..data.load import RowReport, load_image
from .scorer import PairPreprocessor


# of an embedded image, how many bytes from either end go into the digest of the data
ENDS = 4096


@dataclass(frozen=True)
class Span:
    """Rows `start` to `stop` (exclusive) of a block, one batch; `last` ends the block."""

    block: str
    start: int
    stop: int
    last: bool


def spans_of(block: str, rows: int, batch_size: int) -> Iterator[Span]:
    """The batches of a block; one empty batch for an empty block."""
    for start in range(0, max(rows, 1), batch_size):
        stop = min(start + batch_size, rows)
        yield Span(block, start, stop, stop == rows)


class WholeSource:
    """Blocks of a data set that can be indexed.

    Args:
        rows: of `read_rows`.
        report: of `read_rows`.
        shard_size: rows of a block.
    """

    def __init__(self, rows: Dataset, report: RowReport, shard_size: int):
        self.rows, self.report, self.shard_size = rows, report, shard_size
        self.total = len(rows)
        self._table = rows.select_columns(["images", "messages"]).with_format("arrow")

    def __getstate__(self) -> dict[str, Any]:
        return {"_table": self._table, "shard_size": self.shard_size}  # workers only fetch

    def settings(self) -> dict[str, Any]:
        """What the data is, so that progress is not mixed with that of other data."""
        return {"data": data_digest(self.rows)}

    def blocks(self, folder: Path) -> list[str]:
        """Names of all blocks, in the order of their rows."""
        return [f"shard-{number:06d}" for number in range(-(-self.total // self.shard_size))]

    def spans(self, done: set[str], batch_size: int, rank: int, count: int) -> Iterator[Span]:
        """The batches of this process's share of the blocks that are not done."""
        for block in [name for name in self.blocks(Path()) if name not in done][rank::count]:
            yield from spans_of(block, min(self.shard_size, self.total - self._first(block)), batch_size)

    def fetch(self, span: Span) -> tuple[list[dict[str, Any]], list[str | None]]:
        """(undecoded rows, what is wrong with each) of a batch."""
        first = self._first(span.block)
        rows = self._table[first + span.start : first + span.stop].to_pylist()
        return rows, [None] * len(rows)

    def all_rows(self, blocks: list[str]) -> Dataset:
        """The rows in the order of their scores."""
        return self.rows

    def check_complete(self, folder: Path):
        """Raises where a block has no scores."""
        missing = [name for name in self.blocks(folder) if not (folder / f"{name}.parquet").is_file()]
        if missing:
            raise ValueError(f"{missing[0]} of {folder} is missing: run the same command again.")

    def unpaired(self, conversations: bool) -> list[str | None]:
        """What is wrong with each row that is no pair (conversations: that has several images)."""
        reasons: list[str | None] = []
        for batch in self._table.select_columns(["images"]).iter(batch_size=10_000):
            for number in pc.list_value_length(batch["images"]).to_pylist():
                fine = number == 1 or (conversations and number == 0)
                reasons.append(None if fine else Reason(not_a_pair(number)).kept())
        return reasons

    def number(self, position: int) -> int:
        """The number in the source of a row."""
        return self.report.kept[position]

    def _first(self, block: str) -> int:
        return int(block.rpartition("-")[2]) * self.shard_size


class Batches(torch.utils.data.Dataset):
    """Decoded and prepared batches, by `Span`.

    Args:
        source: whose `fetch` gives the rows.
        preprocess: makes tensors of images and captions.
        dtype: of the scorer: images travel to it in that type.
        conversations: rows without images are passed over: they have neither inputs nor a reason.
    """

    def __init__(self, source: Any, preprocess: PairPreprocessor, dtype: torch.dtype, conversations: bool = False):
        self.source, self.preprocess, self.dtype = source, preprocess, dtype
        self.conversations = conversations

    def __getitem__(self, span: Span) -> dict[str, Any]:
        rows, reasons = self.source.fetch(span)
        images, texts, scored = [], [], []
        for position, row in enumerate(rows):
            if reasons[position] is None and (row["images"] or not self.conversations):
                try:
                    text = _caption(row)
                    images.append(load_image(row["images"][0]))
                    texts.append(text)
                    scored.append(position)
                except ValueError as error:
                    reasons[position] = reason_of(error).kept()
        inputs = None
        if images:
            prepared, words, cut = self.preprocess(images, texts)
            prepared = {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in prepared.items()}
            inputs = prepared, words, cut
        return {"span": span, "reasons": reasons, "scored": scored, "inputs": inputs}


def _caption(row: dict[str, Any]) -> str:
    if len(row["images"]) != 1:
        raise ValueError(not_a_pair(len(row["images"])))
    caption = caption_of(row["messages"])
    if not caption:
        raise ValueError("empty answer")
    return caption


def not_a_pair(images: int) -> str:
    """Why a row without exactly one image has no score."""
    return (
        f"{images} images; a pair to score has one image and one text. The paper's stage 2 needs no levels; to score "
        "conversations all the same, set conversations: rows without an image are then kept."
    )


def refuse_other_rows(rows: Dataset, report: RowReport, conversations: bool = False):
    """Raises at the first row that does not have exactly one image (conversations: more than one)."""
    seen = 0
    for batch in rows.select_columns(["images"]).with_format("arrow").iter(batch_size=10_000):
        lengths = pc.list_value_length(batch["images"]).to_numpy(zero_copy_only=False)
        other = np.flatnonzero(lengths > 1 if conversations else lengths != 1)
        if len(other):
            position = int(other[0])
            raise ValueError(
                f"row {report.kept[seen + position]}: {not_a_pair(int(lengths[position]))} Or leave such rows out "
                "with on_bad_row=skip."
            )
        seen += len(lengths)


def data_digest(rows: Dataset) -> str:
    """SHA-256 of texts and images: path, size and time of change of files, length and both ends of embedded bytes."""
    texts, images = hashlib.sha256(), hashlib.sha256()
    for batch in rows.select_columns(["images", "messages"]).with_format("arrow").iter(batch_size=1000):
        for chunk in _chunks(batch["messages"]):
            parts = chunk.flatten().field("content").flatten().field("text")
            texts.update("".join(f"{part}\0" for part in pc.fill_null(parts, "\1").to_pylist()).encode())
        for chunk in _chunks(batch["images"]):
            values = chunk.flatten()
            for path, content in zip(values.field("path").to_pylist(), values.field("bytes"), strict=True):
                if content.is_valid:
                    whole = content.as_buffer()
                    images.update(whole.size.to_bytes(8, "little"))
                    images.update(whole.slice(0, min(ENDS, whole.size)))
                    images.update(whole.slice(max(0, whole.size - ENDS)))
                else:
                    images.update(file_identity(path))
    return hashlib.sha256(texts.digest() + images.digest()).hexdigest()


def file_identity(path: str | Path | None) -> bytes:
    """Path, size and time of change of a file."""
    try:
        status = os.stat(path) if path else None
    except OSError:
        status = None
    return repr((str(path), status and (status.st_size, status.st_mtime_ns))).encode()


def _chunks(column: pa.ChunkedArray | pa.Array) -> list[pa.Array]:
    return column.chunks if isinstance(column, pa.ChunkedArray) else [column]
