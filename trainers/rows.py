"""A data set made ready for a stage: texts encoded and checked once, images left encoded, over-long rows handled."""

from typing import TYPE_CHECKING

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from datasets.arrow_dataset import update_metadata_with_features
from datasets.fingerprint import generate_random_fingerprint
from transformers.utils import logging

from .collator import (
    ROW_INDEX_COLUMN,
    SUPERVISED_COLUMN,
    TOKENS_COLUMN,
    AlignGPTDataCollator,
    describe_row,
    overlong_message,
)
from .data.conversations import FOREIGN
from .data.records import left_encoded
from .data.streaming import ROWS_AT_ONCE, StreamCounts


if TYPE_CHECKING:
    from .stage import StageConfig

logger = logging.get_logger(__name__)

# Tokens of a row with its images expanded, and how many images it has: what grouped batches go by.
LENGTH_COLUMN, NUM_IMAGES_COLUMN = "length", "num_images"
# The least `max_length` that leaves a row its images and the beginning of its answer.
NEEDED_COLUMN = "needed"
# Columns of the source that the collator reads.
USED = ("images", "messages", "align_level", "id")
IMAGES = datasets.List(datasets.Image(decode=False))
INDEX_FEATURES = datasets.Features({ROW_INDEX_COLUMN: datasets.Value("int64")})
TEXT_FEATURES = datasets.Features(
    {
        **INDEX_FEATURES,
        TOKENS_COLUMN: datasets.List(datasets.Value("int32")),
        SUPERVISED_COLUMN: datasets.List(datasets.Value("bool")),
        LENGTH_COLUMN: datasets.Value("int32"),
        NEEDED_COLUMN: datasets.Value("int32"),
    }
)
ENCODED_FEATURES = datasets.Features({**TEXT_FEATURES, NUM_IMAGES_COLUMN: datasets.Value("int32")})


def prepare_rows(
    rows: Dataset | IterableDataset, collator: AlignGPTDataCollator, args: "StageConfig", name: str
) -> tuple[Dataset | IterableDataset, dict[str, int]]:
    """
    Makes a data set ready for the collator.

    Args:
        rows: columns `images` (may be missing) and `messages`, in stage 1 `align_level`; `id` is used in errors.
        collator: whose `encode` and `measure` the rows go through.
        args: `check_rows`, `on_overlong`, `max_length`, `dataset_num_proc`.
        name: of the data set, in messages and counts.

    Returns:
        The rows with the columns of `ENCODED_FEATURES` except `needed` (without `check_rows` only `row_index`, the
        position in `rows`, and `num_images`), and counts for the summary: `{name}_rows`, `{name}_longest_row` (tokens),
        and where there are any `{name}_rows_cut`, `{name}_rows_left_out`, of which `{name}_rows_unusable` were left out
        when the rows were loaded. A stream is counted on the way, by its
        attribute `stream_counts` (see [`stream_totals`]).

    Raises:
        ValueError: missing columns, no rows, or the first bad row.
    """
    if not isinstance(rows, (Dataset, IterableDataset)):
        raise ValueError(
            f"The {name} data is a {type(rows).__name__}: make it a `datasets.Dataset` (`Dataset.from_list`, or "
            "`load_rows` of aligngpt_trainers)."
        )
    streamed = isinstance(rows, IterableDataset)
    unusable = getattr(rows, "rows_left_out", 0)
    if not streamed and len(rows) == 0:
        raise ValueError(f"The {name} data is empty.")
    counts = getattr(rows, "stream_counts", None) or StreamCounts(f"{name} data") if streamed else None
    columns = rows.column_names or list(next(iter(rows), {}))
    if "messages" not in columns:
        raise ValueError(f"The {name} data has no `messages` column but {', '.join(columns)}: use `load_rows`.")
    images = (rows.features or {}).get("images")
    if isinstance(images, (datasets.Image, datasets.Value)):
        raise ValueError(f"The {name} data's `images` must hold lists of images, not {images}: use `load_rows`.")
    used = [column for column in USED if column in columns]
    if streamed:
        # encoded images are opened in the collator, where an error can name the row
        if isinstance(getattr(images, "feature", None), datasets.Image):
            rows = rows.cast_column("images", IMAGES)
        # every process reads rows of its own: a batch whose rows have several images cannot be cut for the others
        args.accelerator_config.dispatch_batches = False
        return _prepare_stream(rows, collator, args, counts), {}
    kept, counts = None, {f"{name}_rows": len(rows)}
    with args.main_process_first(desc=f"reading the {name} texts"):
        if args.check_rows:
            encoded = _encode_all(rows, collator, args, name)
            kept, counts = _fitting(encoded, args, name)
            encoded = encoded.remove_columns(NEEDED_COLUMN)
        else:
            encoded = Dataset.from_dict({ROW_INDEX_COLUMN: np.arange(len(rows))}, features=INDEX_FEATURES)
        rows = rows.select_columns(used)
        if "images" not in columns:
            rows = rows.add_column("images", [[]] * len(rows))
        # beside the table, which copies no image; of a selection `datasets` makes a table first, once
        rows = datasets.concatenate_datasets([rows, encoded], axis=1)
    if unusable:
        counts[f"{name}_rows_left_out"] = counts.get(f"{name}_rows_left_out", 0) + unusable
        counts[f"{name}_rows_unusable"] = unusable
    if isinstance(getattr(images, "feature", None), datasets.Image):
        rows = _undecoded(rows)
    num_images = pc.fill_null(pc.list_value_length(rows.data.column("images")), 0).cast(pa.int32())
    rows = rows.add_column(NUM_IMAGES_COLUMN, num_images, feature=ENCODED_FEATURES[NUM_IMAGES_COLUMN])
    return (rows if kept is None else rows.select(kept)), counts


def stream_totals(rows: Dataset | IterableDataset | None, name: str) -> dict[str, int]:
    """
    What became of a streamed data set's rows so far, in this process and its data loader's: `{name}_rows_read`,
    `{name}_rows_left_out`, `{name}_rows_cut`, where there are any; nothing for other data sets.
    """
    counts = getattr(rows, "stream_counts", None)
    return {} if counts is None else {f"{name}_{kind}": number for kind, number in counts.totals().items()}


def _undecoded(rows: Dataset) -> Dataset:
    """A whole table with images left encoded; `cast_column` would copy the images of lists."""
    features = datasets.Features({**rows.features, "images": IMAGES})
    table = update_metadata_with_features(rows.data.cast(features.arrow_schema), features)
    info = rows.info.copy()
    info.features = features
    return Dataset(table, info=info, split=rows.split, fingerprint=generate_random_fingerprint())


def _encode_chunk(
    chunk: list[dict], collator: AlignGPTDataCollator, limit: int | None
) -> tuple[list[dict], list[int], list[int]]:
    """(tokens, lengths, needed lengths) of rows; the first bad row, or one above `limit` tokens, raises."""
    if collator.use_levels:
        for row in chunk:
            collator.check_level(row)
    encoded = collator.encode(chunk)
    lengths, needed = map(list, zip(*map(collator.measure, encoded), strict=True))
    for row, length in zip(chunk, lengths, strict=True):
        if limit is not None and length > limit:
            raise ValueError(overlong_message(describe_row(row), length, limit))
    return encoded, lengths, needed


def _prepare_stream(
    rows: IterableDataset, collator: AlignGPTDataCollator, args: "StageConfig", counts: StreamCounts
) -> IterableDataset:
    limit = args.max_length

    def encode(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        chunk = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        chunk = [{**row, ROW_INDEX_COLUMN: index} for index, row in zip(indices, chunk, strict=True)]
        encoded, lengths, needed = _encode_chunk(chunk, collator, limit if args.on_overlong == "error" else None)
        counts.add("rows_read", len(chunk))
        kept = []
        for row, tokens, length, least in zip(chunk, encoded, lengths, needed, strict=True):
            if limit is not None and length > limit:
                out = args.on_overlong == "drop" or least > limit
                reason = f"{describe_row(row)} has {length} tokens, more than max_length={limit}"
                counts.add("rows_left_out" if out else "rows_cut", reason=reason)
                if out:
                    continue
            images = row.get("images") or []
            kept.append({**row, "images": images, **tokens, LENGTH_COLUMN: length, NUM_IMAGES_COLUMN: len(images)})
        columns = dict.fromkeys([*batch, "images", *ENCODED_FEATURES])
        columns.pop(NEEDED_COLUMN)
        return {column: [row[column] for row in kept] for column in columns}

    rows = rows.map(encode, batched=True, batch_size=ROWS_AT_ONCE, with_indices=True)
    rows.stream_counts = counts
    return rows


def _encode_all(rows: Dataset, collator: AlignGPTDataCollator, args: "StageConfig", name: str) -> Dataset:
    """A data set of `TEXT_FEATURES`, a row for each of `rows`; the first bad row raises."""
    needed_columns = [name for name in ("messages", "align_level", "id", *FOREIGN) if name in rows.column_names]
    texts = left_encoded(rows.select_columns(needed_columns))
    limit = args.max_length if args.on_overlong == "error" else None

    def encode(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        chunk = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        chunk = [{**row, ROW_INDEX_COLUMN: index} for index, row in zip(indices, chunk, strict=True)]
        encoded, lengths, needed = _encode_chunk(chunk, collator, limit)
        columns = {column: [row[column] for row in encoded] for column in (TOKENS_COLUMN, SUPERVISED_COLUMN)}
        return {ROW_INDEX_COLUMN: indices, **columns, LENGTH_COLUMN: lengths, NEEDED_COLUMN: needed}

    return texts.map(
        encode,
        batched=True,
        with_indices=True,
        remove_columns=needed_columns,
        num_proc=args.dataset_num_proc,
        features=TEXT_FEATURES,
        desc=f"Reading the {name} texts",
    )


def _fitting(encoded: Dataset, args: "StageConfig", name: str) -> tuple[np.ndarray | None, dict[str, int]]:
    """Which rows fit (`None`: all), and the counts."""
    lengths, needed = (encoded.data.column(column).to_numpy() for column in (LENGTH_COLUMN, NEEDED_COLUMN))
    limit = np.inf if args.max_length is None else args.max_length
    kept = (needed if args.on_overlong == "truncate" else lengths) <= limit
    cut, left_out = int((kept & (lengths > limit)).sum()), int((~kept).sum())
    counts = {f"{name}_rows": int(kept.sum()), f"{name}_longest_row": int(lengths.max())}
    if cut or left_out:
        counts |= {f"{name}_rows_cut": cut, f"{name}_rows_left_out": left_out}
        logger.warning(
            f"{name} data: {left_out} of {len(lengths)} rows left out and {cut} cut, because they are longer than "
            f"max_length={args.max_length} (the longest has {lengths.max()} tokens)."
        )
    if not kept.any():
        raise ValueError(f"No row of the {name} data fits into max_length={args.max_length}: raise it.")
    return (np.flatnonzero(kept) if left_out else None), counts
