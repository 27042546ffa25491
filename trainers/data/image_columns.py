"""A column of images in a table -> lists of undecoded images in the same memory."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Features, Image, List
from datasets.table import InMemoryTable, Table

from .arrow_writer import TableWriter
from .images import resolve_path


IMAGES = Features({"x": List(Image())}).arrow_schema.field("x").type


def image_lists(column: pa.ChunkedArray, folder: Path | str | None) -> Table | None:
    """
    A column of images or of lists of them, as paths, bytes or `datasets.Image` -> lists of undecoded images.

    Returns:
        A table `images` that points into the column's own memory (or file), or is copied piece by piece where rows
        without images leave gaps; `None` when the column was just that already.
    """
    joins = folder is not None and column.type == IMAGES
    joins = joins and any(pc.any(_outside(chunk.flatten())).as_py() for chunk in column.chunks)
    if column.type == IMAGES and not column.null_count and not joins:
        return None
    if not column.null_count:
        lists = [_image_list(chunk, folder) for chunk in column.chunks]
        return InMemoryTable(pa.table({"images": pa.chunked_array(lists, IMAGES)}))
    with TableWriter(pa.schema([("images", IMAGES)])) as writer:
        for chunk in column.chunks:
            writer.write({"images": _image_list(chunk, folder)})
        return writer.finish()


def _outside(values: pa.StructArray) -> pa.BooleanArray:
    """Which images are files beside the data set."""
    return pc.and_(values.field("bytes").is_null(), values.field("path").is_valid())


def _image_list(chunk: pa.Array, folder: Path | str | None) -> pa.ListArray:
    if pa.types.is_list(chunk.type) or pa.types.is_large_list(chunk.type):
        values, lengths = chunk.flatten(), pc.fill_null(pc.list_value_length(chunk), 0)
    else:
        if pa.types.is_string(chunk.type) or pa.types.is_large_string(chunk.type):
            chunk = pc.if_else(pc.equal(chunk, ""), None, chunk)
        values, lengths = chunk.drop_null() if chunk.null_count else chunk, pc.cast(chunk.is_valid(), pa.int32())
    values = Image().cast_storage(values)
    outside = _outside(values).to_pylist() if folder is not None else []
    if any(outside):
        paths = values.field("path").to_pylist()
        joined = [resolve_path(path, folder) if o else path for path, o in zip(paths, outside, strict=True)]
        values = pa.StructArray.from_arrays([values.field("bytes"), pa.array(joined, pa.string())], ["bytes", "path"])
    offsets = np.concatenate([[0], np.cumsum(lengths.to_numpy(zero_copy_only=False))]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def paths_of(images: pa.ChunkedArray) -> Iterator[list[str | None]]:
    """For each row its images' paths: None for embedded ones, "" for empty values. Reads no image bytes."""
    for chunk in images.chunks:
        values = chunk.flatten()
        embedded = pc.and_(values.is_valid(), values.field("bytes").is_valid()).to_pylist()
        flat = [None if e else p or "" for p, e in zip(values.field("path").to_pylist(), embedded, strict=True)]
        start = 0
        for length in pc.list_value_length(chunk).to_pylist():
            yield flat[start : start + length]
            start += length
