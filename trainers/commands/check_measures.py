"""What `aligngpt check` measures: tokens, batches, images, levels, an example, steps; each as plain values."""

import math
import time
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
import torch
from accelerate.utils import send_to_device
from datasets import Dataset

from ..collator import ROW_INDEX_COLUMN, SUPERVISED_COLUMN
from ..data.images import decode_images
from ..first_batch import row_names
from ..rows import LENGTH_COLUMN, NUM_IMAGES_COLUMN


if TYPE_CHECKING:
    from ..stage import StageTrainer

NAMED = 5  # rows that are named at most
PERCENTILES = (50, 90, 99)


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
        "rows_without_image": int((columns[NUM_IMAGES_COLUMN] == 0).sum()),
        "most_images": int(columns[NUM_IMAGES_COLUMN].max()),
    }


def level_counts(rows: Dataset, num_levels: int) -> list[int]:
    """Rows of each alignment level."""
    levels = rows.select_columns(["align_level"]).with_format("numpy")[:]["align_level"]
    return np.bincount(levels, minlength=num_levels).tolist()


def image_facts(rows: Dataset, number: int | None) -> dict[str, Any]:
    """
    Decodes images.

    Args:
        rows: with their images still encoded.
        number: of rows whose images are decoded, evenly spread; all, when `None`.
    """
    with_images = np.flatnonzero(rows.select_columns([NUM_IMAGES_COLUMN]).with_format("numpy")[:][NUM_IMAGES_COLUMN])
    if number is not None and len(with_images) > number:
        with_images = with_images[np.linspace(0, len(with_images) - 1, number).round().astype(int)]
    sizes, unreadable = [], []
    for index, found, problems in decode_images(rows, with_images):
        sizes += found
        if problems:
            row = rows.select_columns([name for name in ("id", ROW_INDEX_COLUMN) if name in rows.column_names])[index]
            unreadable += [f"row {row.get('id') or row[ROW_INDEX_COLUMN]}: {problem}" for problem in problems]
    sides = sorted(min(size) for size in sizes)
    return {
        "rows": len(with_images),
        "decoded": len(sizes),
        "unreadable": len(unreadable),
        "first_unreadable": unreadable[:NAMED],
        "shortest_side": sides[0] if sides else None,
        "median_shortest_side": sides[len(sides) // 2] if sides else None,
        "longest_side": max((max(size) for size in sizes), default=None),
    }


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


def longest_batch(trainer: "StageTrainer", batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch of the longest rows; where lengths are not known, the one given."""
    rows = trainer.train_dataset
    if not isinstance(rows, Dataset) or LENGTH_COLUMN not in rows.column_names:
        return batch
    order = np.argsort(rows.with_format("numpy")[LENGTH_COLUMN][:], kind="stable")
    return trainer.data_collator([rows[int(i)] for i in order[-trainer.args.per_device_train_batch_size :]])


def first_loss(trainer: "StageTrainer", batch: dict[str, torch.Tensor]) -> float:
    """Loss of a batch before any step; nothing is trained."""
    model = trainer.model
    training, _ = model.training, model.eval()
    try:
        with torch.no_grad(), trainer.compute_loss_context_manager():
            return float(trainer.compute_loss(model, send_to_device(dict(batch), trainer.args.device)))
    finally:
        model.train(training)


def step_seconds(trainer: "StageTrainer", batch: dict[str, torch.Tensor]) -> float:
    """
    About how long an update takes on this device: by a forward pass of a batch, which has been run before. Backward
    takes as long again where the language model is frozen, else twice as long; checkpointing repeats the forward pass.
    """
    started = time.perf_counter()
    first_loss(trainer, batch)
    passes = (2 if trainer.stage == "pretrain" else 3) + bool(trainer.args.gradient_checkpointing)
    return (time.perf_counter() - started) * passes * trainer.args.gradient_accumulation_steps


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


def batch_names(trainer: "StageTrainer", batch: dict[str, torch.Tensor]) -> list[str]:
    """How errors call the rows of a batch."""
    if ROW_INDEX_COLUMN not in batch:
        return [f"row {place} of the batch" for place in range(len(batch["input_ids"]))]
    indices, rows = batch[ROW_INDEX_COLUMN].tolist(), trainer.train_dataset
    if isinstance(rows, Dataset) and "id" in rows.column_names:
        places = {number: place for place, number in enumerate(rows[ROW_INDEX_COLUMN])}
        return row_names([{"id": rows[places[index]]["id"]} for index in indices])
    return row_names([{ROW_INDEX_COLUMN: index} for index in indices])
