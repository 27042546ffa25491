"""A data set made ready for a stage: texts encoded and checked once, pictures left encoded, over-long rows handled."""

from typing import TYPE_CHECKING

import datasets
import numpy as np
from datasets import Dataset, IterableDataset
from transformers.utils import logging

from .collator import (
    ROW_INDEX_COLUMN,
    SUPERVISED_COLUMN,
    TOKENS_COLUMN,
    AlignGPTDataCollator,
    describe_row,
    overlong_message,
)


if TYPE_CHECKING:
    from .stage import StageConfig

logger = logging.get_logger(__name__)

ENCODED_FEATURES = datasets.Features(
    {
        ROW_INDEX_COLUMN: datasets.Value("int64"),
        TOKENS_COLUMN: datasets.List(datasets.Value("int32")),
        SUPERVISED_COLUMN: datasets.List(datasets.Value("bool")),
        "length": datasets.Value("int32"),
        "needed": datasets.Value("int32"),
    }
)


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
        The rows, and counts for the summary: `{name}_rows`, `{name}_longest_row` (tokens), and where there are any
        `{name}_rows_cut`, `{name}_rows_left_out`. A streamed data set is not counted.

    Raises:
        ValueError: missing columns, no rows, or the first bad row.
    """
    if not isinstance(rows, (Dataset, IterableDataset)):
        raise ValueError(
            f"The {name} data is a {type(rows).__name__}: make it a `datasets.Dataset` (`Dataset.from_list`, or "
            "`load_rows` of aligngpt_trainers)."
        )
    streamed = isinstance(rows, IterableDataset)
    if not streamed and len(rows) == 0:
        raise ValueError(f"The {name} data is empty.")
    columns = rows.column_names or list(next(iter(rows)))
    if "messages" not in columns:
        raise ValueError(f"The {name} data has no `messages` column but {', '.join(columns)}: use `load_rows`.")
    if "images" not in columns:
        rows = rows.map(lambda row: {"images": []}) if streamed else rows.add_column("images", [[]] * len(rows))
    # encoded pictures are opened in the collator, where an error can name the row
    images = (rows.features or {}).get("images")
    if isinstance(getattr(images, "feature", None), datasets.Image):
        rows = rows.cast_column("images", datasets.List(datasets.Image(decode=False)))
    if streamed:
        return _prepare_stream(rows, collator, args, "id" in columns), {}
    if args.check_rows:
        with args.main_process_first(desc=f"reading the {name} texts"):
            encoded = _encode_all(rows, collator, args, name)
        return _select(rows, encoded, args, name)
    # beside a selection, a column could only be put by copying all pictures
    if "id" not in columns and rows._indices is None:
        rows = rows.add_column(ROW_INDEX_COLUMN, list(range(len(rows))))
    return rows, {f"{name}_rows": len(rows)}


def _prepare_stream(
    rows: IterableDataset, collator: AlignGPTDataCollator, args: "StageConfig", has_id: bool
) -> IterableDataset:
    if not has_id:
        rows = rows.map(lambda row, index: {ROW_INDEX_COLUMN: index}, with_indices=True)
    if args.on_overlong == "error" or args.max_length is None:
        return rows

    def fits(row: dict) -> bool:
        length, needed = collator.measure(*collator.encode([row]))
        return (needed if args.on_overlong == "truncate" else length) <= args.max_length

    return rows.filter(fits)


def _encode_all(rows: Dataset, collator: AlignGPTDataCollator, args: "StageConfig", name: str) -> Dataset:
    """A data set of `ENCODED_FEATURES`, a row for each of `rows`; raises at the first bad row."""
    needed_columns = [column for column in ("messages", "align_level", "id") if column in rows.column_names]
    texts = rows.select_columns(needed_columns)

    def encode(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        chunk = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        chunk = [{ROW_INDEX_COLUMN: index, **row} for index, row in zip(indices, chunk, strict=True)]
        if collator.stage == "pretrain":
            for row in chunk:
                collator.check_level(row)
        encoded = collator.encode(chunk)
        lengths, needed = map(list, zip(*map(collator.measure, encoded), strict=True))
        if args.on_overlong == "error" and args.max_length is not None:
            for row, length in zip(chunk, lengths, strict=True):
                if length > args.max_length:
                    raise ValueError(overlong_message(describe_row(row), length, args.max_length))
        columns = {key: [row[key] for row in encoded] for key in (TOKENS_COLUMN, SUPERVISED_COLUMN)}
        return {ROW_INDEX_COLUMN: indices, **columns, "length": lengths, "needed": needed}

    return texts.map(
        encode,
        batched=True,
        with_indices=True,
        remove_columns=needed_columns,
        num_proc=args.dataset_num_proc,
        features=ENCODED_FEATURES,
        desc=f"Reading the {name} texts",
    )


def _select(rows: Dataset, encoded: Dataset, args: "StageConfig", name: str) -> tuple[Dataset, dict[str, int]]:
    """The rows that fit, with what was encoded beside them, and the counts."""
    lengths, needed = np.array(encoded["length"]), np.array(encoded["needed"])
    limit = np.inf if args.max_length is None else args.max_length
    kept = (needed if args.on_overlong == "truncate" else lengths) <= limit
    cut, left_out = int((kept & (lengths > limit)).sum()), int((~kept).sum())
    counts = {f"{name}_rows": int(kept.sum()), f"{name}_longest_row": int(lengths.max())}
    if cut or left_out:
        counts |= {f"{name}_rows_cut": cut, f"{name}_rows_left_out": left_out}
        logger.warning(
            f"{name} data: {left_out} of {len(rows)} rows left out and {cut} cut, because they are longer than "
            f"max_length={args.max_length} (the longest has {lengths.max()} tokens)."
        )
    if not kept.any():
        raise ValueError(f"No row of the {name} data fits into max_length={args.max_length}: raise it.")
    # beside a selection, columns could only be put by copying all pictures: such rows are encoded again in the collator
    if rows._indices is None:
        encoded = encoded.remove_columns(["length", "needed"])
        clash = [column for column in encoded.column_names if column in rows.column_names]
        rows = datasets.concatenate_datasets([rows.remove_columns(clash), encoded], axis=1)
    return (rows.select(np.flatnonzero(kept)) if left_out else rows), counts
