"""Whatever a researcher has -> the rows that both trainers take.

`load_rows` reads LLaVA JSON and JSONL, CSV and TSV, parquet files, folders of `Dataset.save_to_disk`, Hub data sets and
data sets in memory, in the layouts of `conversations.py`, and returns a `datasets.Dataset` with the columns

- `images`: the row's pictures, in reading order (`datasets.Image`, decoded when a row is read, never all at once),
- `messages`: standard chat messages with `{"type": "image"}` placeholders,
- `align_level` (int, 0-based) where the source has `align_level`, or `similarity` as in the authors' release,
- `clip_score` (float) and `id` (string) where the source has them.
"""

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Image, List, Value
from datasets.fingerprint import Hasher
from datasets.info import DatasetInfo
from datasets.table import InMemoryTable, concat_tables
from tqdm.auto import tqdm

from .conversations import ACCEPTED, LAYOUTS, BadRow, find_layout, to_messages
from .images import load_image, resolve_path
from .sources import open_source


__all__ = ["RowReport", "load_image", "load_rows", "read_rows"]

logger = logging.getLogger(__name__)

MESSAGES = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})
OPTIONAL = {"id": Value("string"), "clip_score": Value("float32"), "align_level": Value("int64")}
PICTURE_COLUMNS = ("images", "image")
OTHER_COLUMNS = ("id", "align_level", "similarity", "clip_score")
UNUSED = {"model", "url", "source", "dataset"}  # columns that public releases carry: left out without a word
PICTURES = Features({"x": List(Image())}).arrow_schema.field("x").type
CHUNK = 10_000  # rows held as Python objects at a time


@dataclass
class RowReport:
    """What became of a source's rows.

    Attributes:
        total: rows in the source.
        kept: their 0-based numbers that became rows, in order.
        dropped: (number, id or None, reason) of the others.
    """

    total: int = 0
    kept: list[int] = field(default_factory=list)
    dropped: list[tuple[int, Any, str]] = field(default_factory=list)

    def describe_dropped(self, limit: int = 5) -> str:
        """The first few dropped rows, a line each, and how many more there are."""
        lines = [
            f"  row {number}{f' (id {name!r})' if name is not None else ''}: {reason}"
            for number, name, reason in self.dropped[:limit]
        ]
        if len(self.dropped) > limit:
            lines.append(f"  ... and {len(self.dropped) - limit} more")
        return "\n".join(lines)


def load_rows(source: Any, **options: Any) -> Dataset:
    """The rows of `source` as the trainers take them; arguments and errors are `read_rows`'s."""
    return read_rows(source, **options)[0]


def read_rows(
    source: Any,
    *,
    split: str | None = None,
    name: str | None = None,
    revision: str | None = None,
    image_folder: str | Path | None = None,
    on_bad_row: str = "raise",
    check_images: bool = True,
) -> tuple[Dataset, RowReport]:
    """Reads a source and reports on it.

    Args:
        source: a `.json`, `.jsonl`, `.csv`, `.tsv`, `.parquet` or `.arrow` file, a folder written by `save_to_disk`,
            a folder or Hub id that `datasets.load_dataset` reads, a `Dataset`, or a list of dicts.
        split: which split, where there are several; by default `train`, or the only one.
        name: the configuration of a Hub data set.
        revision: the revision of a Hub data set.
        image_folder: what relative picture paths start from; by default the folder of the file itself.
        on_bad_row: `"raise"` refuses a source with unusable rows and names the first few; `"skip"` leaves them out
            and says how many and why.
        check_images: look whether each picture file exists. Pictures are not decoded here.

    Returns:
        The data set, and the report of rows kept and dropped.

    Raises:
        ValueError: unknown source, columns or split; with `on_bad_row="raise"`, rows that cannot be used.
    """
    if on_bad_row not in ("raise", "skip"):
        raise ValueError(f'on_bad_row must be "raise" or "skip", not {on_bad_row!r}.')
    title = str(source) if isinstance(source, (str, os.PathLike)) else "the data set"
    if image_folder is not None and not os.path.isdir(image_folder):
        raise ValueError(f"image_folder {str(image_folder)!r} does not exist or is not a folder.")
    opened, folder = open_source(source, split, name, revision)
    folder = image_folder if image_folder is not None else folder
    report = RowReport()
    build = _from_dataset if isinstance(opened, Dataset) else _from_records
    rows = build(opened, title, folder, check_images, report)
    if report.dropped and on_bad_row == "raise":
        raise ValueError(
            f"{title}: {len(report.dropped)} of {report.total} rows cannot be used:\n{report.describe_dropped()}\n"
            f'Correct them, or leave them out with on_bad_row="skip".'
        )
    if not report.kept:
        reasons = f" All {report.total} were unusable:\n{report.describe_dropped()}" if report.dropped else ""
        raise ValueError(f"{title}: no rows.{reasons}")
    if report.dropped:
        logger.warning(
            "%s: %d of %d rows left out:\n%s", title, len(report.dropped), report.total, report.describe_dropped()
        )
        rows = rows.select(report.kept)
    return rows, report


def _check_columns(columns: set[str], title: str) -> None:
    layout = find_layout(columns)
    missing_picture = layout in (("caption",), ("text",)) and not columns & set(PICTURE_COLUMNS)
    if layout is None or missing_picture:
        raise ValueError(f"{title}: found the columns {', '.join(sorted(columns))}; accepted are {ACCEPTED}.")
    used = {*layout, *PICTURE_COLUMNS, *OTHER_COLUMNS, *UNUSED}
    if columns - used:
        logger.warning("%s: columns not used: %s.", title, ", ".join(sorted(columns - used)))


def _optional(record: dict[str, Any]) -> dict[str, Any]:
    """Id, finished score and finished level of a record, where it has them."""
    found: dict[str, Any] = {} if record.get("id") is None else {"id": str(record["id"])}
    for column in ("align_level", "similarity"):
        value = record.get(column)
        if value is None or value == "":
            continue
        if isinstance(value, bool) or not float(value).is_integer() or float(value) < 0:
            hint = " (a raw score goes into `clip_score`)" if column == "similarity" else ""
            raise BadRow(f"{column} is {value!r}, not a level 0, 1, 2, ...{hint}")
        found.setdefault("align_level", int(float(value)))
    if record.get("clip_score") not in (None, ""):
        found["clip_score"] = float(record["clip_score"])
    return found


def _convert(
    records: Iterable[tuple[dict[str, Any], int | None, list[str]]], report: RowReport, total: int
) -> Iterator[tuple[list, dict[str, Any]]]:
    """(messages, level columns) of each record; unusable ones give empty messages and an entry in the report."""
    for record, num_images, problems in tqdm(
        records, total=total, desc="Reading rows", unit="row", disable=total < CHUNK
    ):
        number = report.total
        report.total += 1
        try:
            if problems:
                raise BadRow("; ".join(problems))
            layout = find_layout({column for column in record if record[column] is not None})
            if layout is None:
                raise BadRow(f"has only {', '.join(record)}; accepted are {ACCEPTED}")
            result = to_messages(record, layout, num_images or 0), _optional(record)
            report.kept.append(number)
        except (BadRow, TypeError, ValueError) as error:
            result = [], {}
            report.dropped.append((number, record.get("id"), str(error)))
        yield result


def _columns(converted: Iterator[tuple[list, dict]], report: RowReport) -> dict[str, pa.ChunkedArray]:
    """Arrow columns of the converted records, `CHUNK` rows at a time."""
    types = Features({"messages": MESSAGES, **OPTIONAL}).arrow_schema
    chunks: dict[str, list[pa.Array]] = {column: [] for column in types.names}
    while batch := list(islice(converted, CHUNK)):
        chunks["messages"].append(pa.array([messages for messages, _ in batch], types.field("messages").type))
        for column in OPTIONAL:
            chunks[column].append(pa.array([found.get(column) for _, found in batch], types.field(column).type))
    columns = {column: pa.chunked_array(chunks[column], types.field(column).type) for column in types.names}
    for column in OPTIONAL:
        if columns[column].null_count == report.total:
            del columns[column]
        elif column != "id":
            _refuse_gaps(column, columns, report)
    return columns


def _refuse_gaps(column: str, columns: dict[str, pa.ChunkedArray], report: RowReport):
    """Rows with a picture and without a level (or score) where others have one cannot be used."""
    absent = columns[column].is_null().to_pylist()
    gaps = {number for number in report.kept if absent[number]} if any(absent) else set()
    for number in sorted(gaps):
        messages = columns["messages"][number].as_py()
        if any(block["type"] == "image" for message in messages for block in message["content"]):
            report.dropped.append((number, None, f"no {column}, which other rows have"))
        else:
            gaps.discard(number)
    report.kept = [number for number in report.kept if number not in gaps]
    report.dropped.sort(key=lambda entry: entry[0])


def _assemble(images: pa.ChunkedArray | pa.Table, columns: dict[str, pa.ChunkedArray], fingerprint: str) -> Dataset:
    optional = {column: kind for column, kind in OPTIONAL.items() if column in columns}
    features = Features({"images": List(Image()), "messages": MESSAGES, **optional})
    new = InMemoryTable(pa.table(columns))
    first = images if not isinstance(images, pa.ChunkedArray) else InMemoryTable(pa.table({"images": images}))
    table = concat_tables([first, new], axis=1)
    return Dataset(table, info=DatasetInfo(features=features), fingerprint=fingerprint)


def _check_file(path: str, check: bool) -> list[str]:
    if check and not path.startswith(("http://", "https://", "hf://")) and not os.path.isfile(path):
        return [f"no such picture file {path!r} (is image_folder right?)"]
    return []


def _pictures(record: dict[str, Any], folder: Path | str | None, check: bool) -> tuple[list[dict], list[str]]:
    """(the record's pictures, undecoded; what is wrong with them)."""
    value = next((record[column] for column in PICTURE_COLUMNS if record.get(column) is not None), [])
    values = [item for item in (value if isinstance(value, (list, tuple)) else [value]) if item != ""]
    pictures, problems = [], []
    for item in values:
        if isinstance(item, (str, os.PathLike)):
            item = resolve_path(str(item), folder)
            problems += _check_file(item, check)
        try:
            pictures.append(Image().encode_example(item))
        except Exception as error:
            problems.append(f"unusable picture value of type {type(item).__name__} ({error})")
    return pictures, problems


def _from_records(
    records: list[dict], title: str, folder: Path | str | None, check: bool, report: RowReport
) -> Dataset:
    if not records:
        raise ValueError(f"{title}: no rows.")
    if not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{title}: expected a list of dicts.")
    _check_columns(set().union(*records), title)
    chunks, buffer = [], []

    def prepared() -> Iterator[tuple[dict, int, list[str]]]:
        for record in records:
            pictures, problems = _pictures(record, folder, check)
            buffer.append([] if problems else pictures)
            if len(buffer) == CHUNK:
                chunks.append(pa.array(buffer, PICTURES))
                buffer.clear()
            yield record, len(pictures), problems

    columns = _columns(_convert(prepared(), report, len(records)), report)
    images = pa.chunked_array([*chunks, pa.array(buffer, PICTURES)], PICTURES)
    table = pa.table({"images": images, **columns})
    return _assemble(images, columns, Hasher.hash(_table_digest(table)))


def _table_digest(table: pa.Table) -> str:
    """SHA-256 of a table's content: the same rows get the same fingerprint in every run."""
    digest = hashlib.sha256()
    for batch in table.to_batches():
        digest.update(batch.serialize())
    return digest.hexdigest()


def _from_dataset(dataset: Dataset, title: str, folder: Path | str | None, check: bool, report: RowReport) -> Dataset:
    """Embedded pictures stay where they are (memory-mapped); only the text passes through Python."""
    if not len(dataset):
        raise ValueError(f"{title}: no rows.")
    _check_columns(set(dataset.column_names), title)
    if dataset._indices is not None:
        dataset = dataset.flatten_indices()
    dataset = dataset.with_format(None)
    picture_column = next((column for column in PICTURE_COLUMNS if column in dataset.column_names), None)
    in_place = False
    if picture_column is None:
        images = pa.chunked_array([pa.array([[]] * len(dataset), PICTURES)])
    else:
        try:
            images, in_place = _picture_lists(dataset.data.column(picture_column), folder)
        except (pa.ArrowException, TypeError, ValueError, KeyError) as error:
            kind = dataset.features[picture_column]
            raise ValueError(f"{title}: column {picture_column!r} ({kind}) does not hold pictures: {error}") from error
    wanted = {name for layout in LAYOUTS for name in layout} | set(OTHER_COLUMNS)
    text = dataset.select_columns([column for column in dataset.column_names if column in wanted])

    def prepared() -> Iterator[tuple[dict, int, list[str]]]:
        records = (
            dict(zip(batch, values, strict=True))
            for batch in text.iter(batch_size=1000)
            for values in zip(*batch.values(), strict=True)
        )
        for record, paths in zip(records, _paths(images), strict=True):
            yield record, len(paths), [problem for path in paths if path for problem in _check_file(path, check)]

    columns = _columns(_convert(prepared(), report, len(dataset)), report)
    fingerprint = Hasher.hash(["aligngpt rows", dataset._fingerprint, str(folder)])
    if picture_column == "images" and in_place:
        return _assemble(dataset.data.select(["images"]), columns, fingerprint)
    return _assemble(images, columns, fingerprint)


def _picture_lists(column: pa.ChunkedArray, folder: Path | str | None) -> tuple[pa.ChunkedArray, bool]:
    """A column of pictures or of lists of them, as paths, bytes or `datasets.Image` -> lists of undecoded pictures.

    The second value says that the column was just that already.
    """
    chunks, in_place = [], column.type == PICTURES and not column.null_count
    for chunk in column.chunks:
        if pa.types.is_list(chunk.type) or pa.types.is_large_list(chunk.type):
            values, lengths = chunk.flatten(), pc.fill_null(pc.list_value_length(chunk), 0)
        else:
            if pa.types.is_string(chunk.type) or pa.types.is_large_string(chunk.type):
                chunk = pc.if_else(pc.equal(chunk, ""), None, chunk)
            values, lengths = chunk.drop_null() if chunk.null_count else chunk, pc.cast(chunk.is_valid(), pa.int32())
        values = Image().cast_storage(values)
        paths = values.field("path")
        outside = pc.and_(values.field("bytes").is_null(), paths.is_valid()).to_pylist()
        if folder is not None and any(outside):
            in_place = False
            joined = [resolve_path(p, folder) if o else p for p, o in zip(paths.to_pylist(), outside, strict=True)]
            values = pa.StructArray.from_arrays(
                [values.field("bytes"), pa.array(joined, pa.string())], ["bytes", "path"]
            )
        offsets = np.concatenate([[0], np.cumsum(lengths.to_numpy(zero_copy_only=False))]).astype(np.int32)
        chunks.append(pa.ListArray.from_arrays(pa.array(offsets), values))
    return pa.chunked_array(chunks, PICTURES), in_place


def _paths(images: pa.ChunkedArray) -> Iterator[list[str | None]]:
    """For each row its pictures' paths, None for embedded ones. Reads no picture bytes."""
    for chunk in images.chunks:
        values = chunk.flatten()
        embedded = values.field("bytes").is_valid().to_pylist()
        flat = [None if e else p for p, e in zip(values.field("path").to_pylist(), embedded, strict=True)]
        start = 0
        for length in pc.list_value_length(chunk).to_pylist():
            yield flat[start : start + length]
            start += length
