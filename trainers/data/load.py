"""Data in any accepted layout -> the rows that both trainers take.

`load_rows` reads LLaVA JSON and JSONL, CSV and TSV, parquet files, folders of `Dataset.save_to_disk`, Hub data sets and
data sets in memory, in the layouts of `conversations.py`, and returns a `datasets.Dataset` with the columns

- `images`: the row's images, in reading order (`datasets.Image`, decoded when a row is read, never all at once),
- `messages`: standard chat messages with `{"type": "image"}` placeholders,
- `align_level` (int, 0-based) where the source has `align_level`, or `similarity` as in the authors' release,
- `clip_score` (float) and `id` (string) where the source has them.

Files are read piece by piece and the rows beyond a few megabytes lie in a memory-mapped file; `streaming` leaves out
that file too (see `streaming.py`).
"""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, Features, Image, IterableDataset, List, concatenate_datasets
from datasets.fingerprint import Hasher, generate_fingerprint
from datasets.info import DatasetInfo
from datasets.table import InMemoryTable, Table, concat_tables
from tqdm.auto import tqdm

from .arrow_writer import TableWriter
from .columns import (
    IMAGE_COLUMNS,
    captions_of_a_table_apart,
    holds_images_in_parts,
)
from .conversations import ROW_ERRORS, UNREADABLE, BadRow, Broken, Reason, captions_apart, reason_of
from .image_columns import IMAGES, image_lists, paths_of
from .images import decode_images, load_image
from .kept import KeptColumns, kept_names
from .records import (
    MESSAGES,
    OPTIONAL,
    USED_COLUMNS,
    check_columns,
    check_file,
    convert_record,
    encode_images,
    has_image,
    left_encoded,
    name_of,
)
from .sources import Records, open_source
from .streaming import stream_rows


__all__ = ["MESSAGES", "RowReport", "load_image", "load_rows", "read_rows"]

logger = logging.getLogger(__name__)

KEPT = "_kept"  # of a table that is being made: the columns to keep, as JSON
CHUNK = 1_000  # rows held as Python objects at a time


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


def load_rows(
    source: Any,
    *,
    streaming: bool = False,
    shuffle_buffer: int = 1000,
    seed: int = 0,
    shared: bool = False,
    **options: Any,
) -> Dataset | IterableDataset:
    """
    The rows of `source` as the trainers take them. With `on_bad_row="skip"` each image is decoded once, here or on a
    stream's way, so that one that cannot be read costs its row alone; how many rows were left out stands in the
    attribute `rows_left_out` of a data set and in `stream_counts` of a stream.

    Args:
        source: as for [`read_rows`].
        streaming: give an `IterableDataset` whose rows are read and converted on the way, in constant memory and
            without a local copy: for what does not fit on the disk. Bad rows are met on the way too.
        shuffle_buffer: rows of a stream among which the next one is drawn, besides shuffling its shards; 0 keeps the
            order. Has no effect on a data set that is not streamed: the trainers shuffle that whole.
        seed: of that shuffling.
        shared: all processes of a run make this call at the same time: they share the decoding, and leave out the same
            rows.
        options: as for [`read_rows`].

    Raises:
        ValueError: as [`read_rows`].
    """
    if not streaming and not isinstance(source, IterableDataset):
        skip = options.get("on_bad_row", "raise") == "skip" and options.get("check_images", True)
        rows, report = read_rows(source, decode=skip, shared=shared, **options)
        rows.rows_left_out = len(report.dropped)
        return rows
    if isinstance(source, (list, tuple)):
        source = read_rows(source, **options)[0]
        options.pop("columns", None)
    title, opened, folder = _open(source, streaming=True, **options)
    return stream_rows(
        opened,
        title,
        folder,
        check_images=options.get("check_images", True),
        skip=options.get("on_bad_row", "raise") == "skip",
        shuffle_buffer=shuffle_buffer,
        seed=seed,
    )


def read_rows(
    source: Any,
    *,
    split: str | None = None,
    name: str | None = None,
    revision: str | None = None,
    image_folder: str | Path | None = None,
    columns: Mapping[str, str] | str | None = None,
    on_bad_row: str = "raise",
    check_images: bool = True,
    decode: bool = False,
    shared: bool = False,
    keep_columns: bool = False,
) -> tuple[Dataset, RowReport]:
    """Reads a source and reports on it.

    Args:
        source: a `.json`, `.jsonl`, `.csv`, `.tsv`, `.parquet` or `.arrow` file, a pattern for several such as
            `parts/*.parquet`, a folder written by `save_to_disk`, a folder or Hub id that `datasets.load_dataset`
            reads, a `Dataset`, or a list of dicts.
        split: which split, where there are several; by default `train`, or the only one.
        name: the configuration of a Hub data set.
        revision: the revision of a Hub data set.
        image_folder: what relative image paths start from; by default the folder of the file itself.
        columns: the source's names of columns by ours, as `{"image": "img", "clip_score": "metrics.clip"}`; what a
            list holds for a score becomes its mean. Also as text: `image=img,text=alt`.
        on_bad_row: `"raise"` refuses a source with unusable rows and names the first few; `"skip"` leaves them out
            and says how many and why.
        check_images: look whether each image file exists.
        decode: decode each image once, too: one that cannot be read makes its row unusable.
        shared: all processes of a run make this call at the same time: they share the decoding.
        keep_columns: keep the columns that no layout reads, too.

    Returns:
        The data set, and the report of rows kept and dropped.

    Raises:
        ValueError: unknown source, columns or split; with `on_bad_row="raise"`, rows that cannot be used.
    """
    title, opened, folder = _open(source, split, name, revision, image_folder, columns, on_bad_row)
    report = RowReport()
    if isinstance(opened, IterableDataset):
        raise ValueError(f"{title}: it is a stream; read it with load_rows(..., streaming=True).")
    build = _from_dataset if isinstance(opened, Dataset) else _from_records
    rows = build(opened, title, folder, check_images, report, keep_columns)
    if decode:
        _drop_unreadable(rows, report, shared)
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


def _open(
    source: Any,
    split: str | None = None,
    name: str | None = None,
    revision: str | None = None,
    image_folder: str | Path | None = None,
    columns: Mapping[str, str] | str | None = None,
    on_bad_row: str = "raise",
    check_images: bool = True,
    streaming: bool = False,
) -> tuple[str, Any, Path | str | None]:
    """(how errors name the source, what was opened, the folder that relative image paths start from)."""
    if on_bad_row not in ("raise", "skip"):
        raise ValueError(f'on_bad_row must be "raise" or "skip", not {on_bad_row!r}.')
    if image_folder is not None and not os.path.isdir(image_folder):
        raise ValueError(f"image_folder {str(image_folder)!r} does not exist or is not a folder.")
    title = str(source) if isinstance(source, (str, os.PathLike)) else "the data set"
    opened, folder = open_source(source, split, name, revision, streaming, columns)
    return title, opened, image_folder if image_folder is not None else folder


def _convert(
    records: Iterable[tuple[dict[str, Any], list[dict] | list[str], list[str]]],
    report: RowReport,
    total: int | None,
    kept: KeptColumns | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows of records; unusable ones become empty rows and an entry in the report."""
    for record, images, problems in tqdm(records, total=total, desc="Reading rows", unit="row", delay=2):
        number = report.total
        report.total += 1
        try:
            if problems:
                raise BadRow("; ".join(problems), UNREADABLE)
            messages, found = convert_record(record, len(images))
            others = {} if kept is None else {KEPT: kept.take(record)}
            report.kept.append(number)
            yield {"images": images, "messages": messages, **found, **others}
        except ROW_ERRORS as error:
            report.dropped.append((number, name_of(record), reason_of(error)))
            yield {"images": [], "messages": []}


def _write(converted: Iterator[dict[str, Any]], writer: TableWriter, report: RowReport) -> Table:
    """The table of converted rows, made `CHUNK` rows at a time; optional columns without any value are left out."""
    while batch := list(islice(converted, CHUNK)):
        writer.write({column: [row.get(column) for row in batch] for column in writer.schema.names})
    table = writer.finish()
    found = [name for name in table.column_names if name not in OPTIONAL or table.column(name).null_count < len(table)]
    table = table.select(found)
    for column in ("clip_score", "align_level"):
        if column in found:
            _refuse_gaps(column, table, report)
    return table


def _refuse_gaps(column: str, table: Table, report: RowReport) -> None:
    """Rows with an image and without a level (or score) where others have one cannot be used."""
    if not table.column(column).null_count:
        return
    absent = table.column(column).is_null().to_pylist()
    messages = table.column("messages")
    gaps = {number for number in report.kept if absent[number] and has_image(messages[number].as_py())}
    report.dropped += [(number, None, Reason(f"no {column}, which other rows have")) for number in sorted(gaps)]
    report.kept = [number for number in report.kept if number not in gaps]
    report.dropped.sort(key=lambda entry: entry[0])


def _drop_unreadable(rows: Dataset, report: RowReport, shared: bool) -> None:
    """Rows with an image that cannot be decoded are no longer kept; where `shared`, the same in all processes."""
    rank, count = (PartialState().process_index, PartialState().num_processes) if shared else (0, 1)
    decoded = decode_images(rows, report.kept[rank::count])
    found = [(number, "; ".join(problems)) for number, _, problems in decoded if problems]
    reasons = dict(gather_object(found) if count > 1 else found)
    names = rows.select_columns(["id"]) if "id" in rows.column_names else None
    report.dropped += [
        (number, names and names[number]["id"], Reason(reason, UNREADABLE)) for number, reason in reasons.items()
    ]
    report.dropped.sort(key=lambda entry: entry[0])
    report.kept = [number for number in report.kept if number not in reasons]


def _assemble(table: Table, fingerprint: str) -> Dataset:
    optional = {column: kind for column, kind in OPTIONAL.items() if column in table.column_names}
    features = Features({"images": List(Image()), "messages": MESSAGES, **optional})
    return Dataset(table, info=DatasetInfo(features=features), fingerprint=fingerprint)


def _schema(*columns: str) -> pa.Schema:
    kinds = {"images": List(Image()), "messages": MESSAGES, **OPTIONAL}
    return pa.schema([(name, Features({name: kinds[name]}).arrow_schema.field(name).type) for name in columns])


def _from_records(
    records: list[dict] | Records | Dataset,
    title: str,
    folder: Path | str | None,
    check: bool,
    report: RowReport,
    keep: bool = False,
) -> Dataset:
    if isinstance(records, list) and not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{title}: expected a list of dicts.")
    columns: set[str] = set()

    def prepared() -> Iterator[tuple[dict, list[dict], list[str]]]:
        for given in records:
            columns.update(() if isinstance(given, Broken) else given)
            for record in captions_apart(given):
                yield record, *encode_images(record, folder, check)

    total = None if isinstance(records, Records) else len(records)
    kept, schema = KeptColumns() if keep else None, _schema("images", "messages", *OPTIONAL)
    with TableWriter(schema.append(pa.field(KEPT, pa.string())) if keep else schema) as writer:
        table = _write(_convert(prepared(), report, total, kept), writer, report)
        if not report.total:
            raise ValueError(f"{title}: no rows.")
        if columns or not report.dropped:  # otherwise no record could be read, which is said of each
            check_columns(columns, title)
        others = kept.table(table.column(KEPT)) if kept is not None else None
        table = table.select([name for name in table.column_names if name != KEPT])
        rows = _assemble(table, Hasher.hash(writer.digest))
        return concatenate_datasets([rows, Dataset(others)], axis=1) if others and others.column_names else rows


def _from_dataset(
    dataset: Dataset, title: str, folder: Path | str | None, check: bool, report: RowReport, keep: bool = False
) -> Dataset:
    """Embedded images stay where they are (memory-mapped); only the text passes through Python."""
    if not len(dataset):
        raise ValueError(f"{title}: no rows.")
    check_columns(set(dataset.column_names), title)
    dataset = _flattened(captions_of_a_table_apart(dataset.with_format(None)))
    image_column = next((column for column in IMAGE_COLUMNS if column in dataset.column_names), None)
    if image_column is None and holds_images_in_parts(dataset.features):
        return _from_records(left_encoded(dataset), title, folder, check, report, keep)
    if image_column is None:
        images = InMemoryTable(pa.table({"images": pa.array([[]] * len(dataset), IMAGES)}))
    else:
        try:
            images = image_lists(dataset.data.column(image_column), folder)
        except (pa.ArrowException, TypeError, ValueError, KeyError) as error:
            kind = dataset.features[image_column]
            raise ValueError(f"{title}: column {image_column!r} ({kind}) does not hold images: {error}") from error
        if images is None and image_column == "images":
            images = dataset.data.select(["images"])
        elif images is None:  # lists of images under the name of a single one
            images = InMemoryTable(pa.table({"images": dataset.data.column(image_column)}))
    text = left_encoded(dataset.select_columns([name for name in dataset.column_names if name in USED_COLUMNS]))

    def prepared() -> Iterator[tuple[dict, list[str], list[str]]]:
        records = (
            dict(zip(batch, values, strict=True))
            for batch in text.iter(batch_size=1000)
            for values in zip(*batch.values(), strict=True)
        )
        for record, paths in zip(records, paths_of(images.column("images")), strict=True):
            yield record, paths, [problem for path in paths if path is not None for problem in _check_path(path, check)]

    with TableWriter(_schema("messages", *OPTIONAL)) as writer:
        table = _write(_convert(prepared(), report, len(dataset)), writer, report)
    fingerprint = Hasher.hash(["aligngpt rows", generate_fingerprint(dataset), str(folder)])
    rows = _assemble(concat_tables([images, table], axis=1), fingerprint)
    others = kept_names(dataset.column_names) if keep else []
    return concatenate_datasets([rows, left_encoded(dataset.select_columns(others))], axis=1) if others else rows


def _flattened(dataset: Dataset) -> Dataset:
    """The data set with a table of its own where it is a selection, as `datasets` makes to put a column beside it."""
    beside = Dataset.from_dict({"": [None] * len(dataset)})
    return concatenate_datasets([dataset, beside], axis=1).remove_columns("")


def _check_path(path: str, check: bool) -> list[str]:
    return check_file(path, check) if path else ["an empty image value: neither a path nor bytes"]
