"""The report before a run's first step: how its first rows look to the model."""

from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, IterableDataset

from aligngpt_shared.printing import printable

from .collator import IGNORE_INDEX, AlignGPTDataCollator, describe_row
from .memory import count_parameters


if TYPE_CHECKING:
    from .stage import StageTrainer

MARKS = ("[[", "]]")  # around the supervised tokens of an example


def first_rows(rows: Dataset | IterableDataset, number: int) -> list[dict[str, Any]]:
    """The first rows, images still encoded; a stream's counts stay as they were."""
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
        ValueError: naming the row, where no token is supervised or image tokens and images do not match.
    """
    supervised = (batch["labels"] != IGNORE_INDEX).any(1).tolist()
    if not all(supervised):
        raise ValueError(f"{names[supervised.index(False)]} has no supervised token: nothing in it can be learned.")
    tokens = int((batch["input_ids"] == collator.processor.image_token_id).sum())
    images = len(batch["pixel_values"]) if "pixel_values" in batch else 0
    if tokens != images * collator.processor.image_seq_length:
        raise ValueError(
            f"The first batch ({names[0]} and those after it) has {images} images and {tokens} image tokens, not "
            f"{collator.processor.image_seq_length} an image: the processor does not belong to the model."
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
        "images": len(batch["pixel_values"]) if "pixel_values" in batch else 0,
    }


def mark_supervised(
    input_ids: torch.Tensor, labels: torch.Tensor, attention_mask: torch.Tensor, collator: AlignGPTDataCollator
) -> str:
    """A row's text as the model reads it: `[[...]]` around what is supervised, `<image>x576` for an image's tokens."""
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
            per_image = processor.image_seq_length
            text += "".join(f"{processor.image_token}x{per_image}" for _ in range(len(tokens) // per_image))
            continue
        # decoded with what stands before it, since tokenizers drop a space at the beginning
        read += tokens
        whole = processor.tokenizer.decode(read, skip_special_tokens=False)
        piece, shown = whole[len(shown) :], whole
        text += f"{MARKS[0]}{piece}{MARKS[1]}" if is_supervised else piece
    return text


def row_names(rows: list[dict[str, Any]]) -> list[str]:
    """How errors call rows."""
    return [describe_row(row) for row in rows]


def log_first_batch(trainer: "StageTrainer") -> None:
    """
    The short check at step 0: prints what the first rows look like, reading them beside the training's own order.

    Raises:
        ValueError: naming the row, where nothing is supervised or image tokens and images do not match.
    """
    collator = trainer.data_collator
    rows = first_rows(trainer.train_dataset, trainer.args.per_device_train_batch_size)
    if not rows:
        raise ValueError("The train data has no rows.")
    names = row_names(rows)
    batch = collator(rows)
    check_batch(batch, names, collator)
    facts = batch_facts(batch, collator.processor.image_token_id)
    counts = {name: part["trained"] for name, part in count_parameters(trainer.model).items() if part["trained"]}
    left = {key: trainer.row_counts.get(f"train_rows_{key}", 0) for key in ("cut", "left_out")}
    noted = "".join(f", {number:,} {key.replace('_', ' ')}" for key, number in left.items() if number)
    text = mark_supervised(batch["input_ids"][0], batch["labels"][0], batch["attention_mask"][0], collator)
    text = " ".join(text.split("\n"))
    total = trainer.row_counts.get("train_rows")
    longest = trainer.row_counts.get("train_longest_row")
    lines = [
        f"{trainer.stage}: {'a stream of' if total is None else f'{total:,}'} rows{noted}"
        + (f", the longest of {longest} tokens" if longest else "")
        + f" (max_length {trainer.args.max_length})",
        f"  first {facts['rows']} rows: {facts['length']} tokens wide, {facts['padding'] / facts['positions']:.0%} "
        f"padding, {facts['images']} images, {facts['supervised']} supervised tokens",
        "  trains " + ", ".join(f"{name} {number:,}" for name, number in counts.items()),
        f"  {names[0]}: {text if len(text) <= 300 else f'{text[:300]} ...'}",
    ]
    print(printable("\n".join(lines)), flush=True)
