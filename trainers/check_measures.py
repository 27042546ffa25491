"""What `aligngpt check` measures: tokens, batches, pictures, levels, an example, steps; each as plain values."""

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset, IterableDataset
from tqdm.auto import tqdm

from .collator import IGNORE_INDEX, ROW_INDEX_COLUMN, SUPERVISED_COLUMN, AlignGPTDataCollator, describe_row
from .images import load_image
from .rows import LENGTH_COLUMN, NUM_IMAGES_COLUMN


if TYPE_CHECKING:
    from .stage import StageTrainer

MARKS = ("[[", "]]")  # around the supervised tokens of an example
NAMED = 5  # rows that are named at most
PERCENTILES = (50, 90, 99)


def first_rows(rows: Dataset | IterableDataset, number: int) -> list[dict[str, Any]]:
    """The first rows, pictures still encoded; a stream's counts stay as they were."""
    if isinstance(rows, Dataset):
        return [rows[index] for index in range(min(number, len(rows)))]
    found = list(islice(iter(rows), number))
    counts = getattr(rows, "stream_counts", None)
    if counts is not None:
        counts.reset()
    return found


def check_batch(batch: dict[str, torch.Tensor], names: list[str], collator: AlignGPTDataCollator) -> None:
    """
    Refuses a batch that cannot be trained on.

    Args:
        batch: from the collator.
        names: how errors call its rows.
        collator: that made it.

    Raises:
        ValueError: naming the row, where no token is supervised or image tokens and pictures do not match.
    """
    supervised = (batch["labels"] != IGNORE_INDEX).any(1).tolist()
    if not all(supervised):
        raise ValueError(f"{names[supervised.index(False)]} has no supervised token: nothing in it can be learned.")
    tokens = int((batch["input_ids"] == collator.processor.image_token_id).sum())
    pictures = len(batch["pixel_values"]) if "pixel_values" in batch else 0
    if tokens != pictures * collator.processor.image_seq_length:
        raise ValueError(
            f"The first batch ({names[0]} and those after it) has {pictures} pictures and {tokens} image tokens, not "
            f"{collator.processor.image_seq_length} a picture: the processor does not belong to the model."
        )


def batch_facts(batch: dict[str, torch.Tensor], image_token_id: int) -> dict[str, Any]:
    """Sizes of a batch."""
    mask = batch["attention_mask"]
    return {
        "rows": len(mask),
        "length": mask.shape[1],
        "positions": mask.numel(),
        "padding": mask.numel() - int(mask.sum()),
        "image_tokens": int((batch["input_ids"] == image_token_id).sum()),
        "supervised": int((batch["labels"] != IGNORE_INDEX).sum()),
        "pictures": len(batch["pixel_values"]) if "pixel_values" in batch else 0,
    }


def token_facts(rows: Dataset, image_seq_length: int, max_length: int | None) -> dict[str, Any]:
    """Token budget of rows that carry their lengths."""
    columns = rows.select_columns([LENGTH_COLUMN, NUM_IMAGES_COLUMN]).with_format("numpy")[:]
    lengths = np.minimum(columns[LENGTH_COLUMN], max_length or np.iinfo(np.int32).max).astype(np.int64)
    supervised = 0
    for table in rows.select_columns([SUPERVISED_COLUMN]).with_format("arrow").iter(batch_size=1000):
        for chunk in table.column(SUPERVISED_COLUMN).chunks:
            supervised += pc.sum(chunk.flatten()).as_py() or 0
    total = int(lengths.sum())
    return {
        "rows": len(rows),
        "tokens": total,
        "mean": total / len(rows),
        "longest": int(columns[LENGTH_COLUMN].max()),
        **{f"p{share}": int(np.percentile(lengths, share)) for share in PERCENTILES},
        "max_length": max_length,
        "image_tokens": int(columns[NUM_IMAGES_COLUMN].sum()) * image_seq_length,
        "supervised": supervised,
        "rows_without_picture": int((columns[NUM_IMAGES_COLUMN] == 0).sum()),
        "most_pictures": int(columns[NUM_IMAGES_COLUMN].max()),
    }


def level_counts(rows: Dataset, num_levels: int) -> list[int]:
    """Rows of each alignment level."""
    levels = rows.select_columns(["align_level"]).with_format("numpy")[:]["align_level"]
    return np.bincount(levels, minlength=num_levels).tolist()


def picture_facts(rows: Dataset, number: int | None) -> dict[str, Any]:
    """
    Decodes pictures.

    Args:
        rows: with their pictures still encoded.
        number: of rows whose pictures are decoded, evenly spread; all, when `None`.
    """
    with_pictures = np.flatnonzero(rows.select_columns([NUM_IMAGES_COLUMN]).with_format("numpy")[:][NUM_IMAGES_COLUMN])
    if number is not None and len(with_pictures) > number:
        with_pictures = with_pictures[np.linspace(0, len(with_pictures) - 1, number).round().astype(int)]
    named = [column for column in ("id", ROW_INDEX_COLUMN, "images") if column in rows.column_names]
    rows = rows.select_columns(named)
    sizes, unreadable = [], []

    def decode(index: int) -> tuple[list[tuple[int, int]], list[str]]:
        row, found, problems = rows[int(index)], [], []
        for picture in row["images"]:
            try:
                found.append(load_image(picture, row=row.get("id") or row[ROW_INDEX_COLUMN]).size)
            except ValueError as error:
                problems.append(str(error))
        return found, problems

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        decoded = tqdm(
            pool.map(decode, with_pictures), total=len(with_pictures), desc="Decoding pictures", unit="row", delay=2
        )
        for found, problems in decoded:
            sizes += found
            unreadable += problems
    sides = sorted(min(size) for size in sizes)
    return {
        "rows": len(with_pictures),
        "decoded": len(sizes),
        "unreadable": len(unreadable),
        "first_unreadable": unreadable[:NAMED],
        "shortest_side": sides[0] if sides else None,
        "median_shortest_side": sides[len(sides) // 2] if sides else None,
        "longest_side": max((max(size) for size in sizes), default=None),
    }


def mark_supervised(
    input_ids: torch.Tensor, labels: torch.Tensor, attention_mask: torch.Tensor, collator: AlignGPTDataCollator
) -> str:
    """A row's text as the model reads it: `[[...]]` around what is supervised, `<image>x576` for a picture's tokens."""
    processor = collator.processor
    image = processor.image_token_id
    kept = attention_mask.bool()
    ids, supervised = input_ids[kept].tolist(), (labels[kept] != IGNORE_INDEX).tolist()
    text, shown, read = "", "", []
    for (is_image, is_supervised), group in groupby(
        zip(ids, supervised, strict=True), key=lambda pair: (pair[0] == image, pair[1])
    ):
        tokens = [token for token, _ in group]
        if is_image:
            per_picture = processor.image_seq_length
            text += "".join(f"{processor.image_token}x{per_picture}" for _ in range(len(tokens) // per_picture))
            continue
        # decoded with what stands before it, since tokenizers drop a space at the beginning
        read += tokens
        whole = processor.tokenizer.decode(read, skip_special_tokens=False)
        piece, shown = whole[len(shown) :], whole
        text += f"{MARKS[0]}{piece}{MARKS[1]}" if is_supervised else piece
    return text


def first_batches(trainer: "StageTrainer", number: int) -> Iterator[dict[str, torch.Tensor]]:
    """The first batches of training, in its order; read in this process, so that errors come as they are."""
    workers, trainer.args.dataloader_num_workers = trainer.args.dataloader_num_workers, 0
    prefetch, trainer.args.dataloader_prefetch_factor = trainer.args.dataloader_prefetch_factor, None
    try:
        yield from islice(trainer.get_train_dataloader(), number)
    finally:
        trainer.args.dataloader_num_workers, trainer.args.dataloader_prefetch_factor = workers, prefetch
        counts = getattr(trainer.train_dataset, "stream_counts", None)
        if counts is not None:
            counts.reset()


def first_loss(trainer: "StageTrainer", batch: dict[str, torch.Tensor]) -> float:
    """Loss of a batch before any step; nothing is trained."""
    model = trainer.model
    training, _ = model.training, model.eval()
    try:
        with torch.no_grad(), trainer.compute_loss_context_manager():
            return float(trainer.compute_loss(model, trainer._prepare_inputs(dict(batch))))
    finally:
        model.train(training)


def step_facts(args: Any, num_rows: int | None, num_devices: int) -> dict[str, Any]:
    """How many updates a run makes, as [`transformers.Trainer`] counts them."""
    per_update = args.per_device_train_batch_size * args.gradient_accumulation_steps * num_devices
    facts = {"rows_per_update": per_update, "num_devices": num_devices}
    if num_rows is None or args.max_steps > 0:
        epochs = None if num_rows is None else args.max_steps * per_update / num_rows
        return {**facts, "steps": args.max_steps, "epochs": epochs}
    size = args.per_device_train_batch_size * num_devices
    batches = num_rows // size if args.dataloader_drop_last else math.ceil(num_rows / size)
    updates = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
    return {**facts, "steps": math.ceil(args.num_train_epochs * updates), "epochs": args.num_train_epochs}


def row_names(rows: list[dict[str, Any]]) -> list[str]:
    """How errors call rows."""
    return [describe_row(row) for row in rows]


def batch_names(trainer: "StageTrainer", batch: dict[str, torch.Tensor]) -> list[str]:
    """How errors call the rows of a batch."""
    if ROW_INDEX_COLUMN not in batch:
        return [f"row {place} of the batch" for place in range(len(batch["input_ids"]))]
    indices, rows = batch[ROW_INDEX_COLUMN].tolist(), trainer.train_dataset
    if isinstance(rows, Dataset) and "id" in rows.column_names:
        places = {number: place for place, number in enumerate(rows[ROW_INDEX_COLUMN])}
        return row_names([{"id": rows[places[index]]["id"]} for index in indices])
    return row_names([{ROW_INDEX_COLUMN: index} for index in indices])
