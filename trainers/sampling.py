"""Batches of similar rows: less padding, and every process with images, or without, at the same step."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import Sampler
from transformers.utils import logging


logger = logging.get_logger(__name__)

GROUPINGS = ("none", "length", "modality_length")
# Rows of a pool, in blocks: sorted by length within it, random beyond.
POOL_BLOCKS = 50


class GroupedSampler(Sampler[int]):
    """
    Order of rows in which every block of `batch_size * world_size` rows, what all processes take at one step, holds
    rows of similar length and, when `has_images` is given, of one modality.

    The rows of a modality are shuffled, those that fill no block are set aside, pools of blocks are sorted by length
    and cut into blocks, and the blocks are shuffled, the one with the longest row first, so that a lack of memory
    shows at once. The rows set aside come last, those with images first: one batch of a process at most is mixed.

    `transformers` groups by length too (`train_sampling_strategy`), but with the global random state, without
    modalities, and for the batch of one process.

    Args:
        lengths: tokens of each row, shape `(rows,)`.
        batch_size: rows of one process and step.
        world_size: number of processes.
        has_images: whether each row has an image, shape `(rows,)`; one group when `None`.
        seed: the order is that of `seed + epoch` alone, so that a run can be continued.
        drop_last: leave out the rows that fill no block.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        world_size: int = 1,
        has_images: Sequence[bool] | None = None,
        seed: int = 0,
        drop_last: bool = False,
    ):
        self.lengths = np.asarray(lengths)
        self.has_images = None if has_images is None else np.asarray(has_images, dtype=bool)
        self.block = batch_size * world_size
        self.seed, self.epoch, self.drop_last = seed, 0, drop_last

    def set_epoch(self, epoch: int):
        """Chooses the order of an epoch, from 0."""
        self.epoch = epoch

    def _groups(self) -> list[np.ndarray]:
        everything = np.arange(len(self.lengths))
        if self.has_images is None:
            return [everything]
        return [everything[self.has_images], everything[~self.has_images]]

    def __len__(self) -> int:
        if self.drop_last:
            return sum(len(group) // self.block * self.block for group in self._groups())
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)

        def permuted(number: int) -> np.ndarray:
            return torch.randperm(number, generator=generator).numpy()

        blocks, rest = [], []
        for group in self._groups():
            group = group[permuted(len(group))]
            whole = len(group) // self.block * self.block
            rest.append(group[whole:])
            # a few pools even for little data, or all epochs would look the same
            blocks_of_pool = max(1, min(POOL_BLOCKS, whole // self.block // 4))
            for start in range(0, whole, blocks_of_pool * self.block):
                pool = group[start : min(start + blocks_of_pool * self.block, whole)]
                pool = pool[np.argsort(-self.lengths[pool], kind="stable")]
                blocks.extend(pool.reshape(-1, self.block))
        blocks = [blocks[index] for index in permuted(len(blocks))]
        if blocks:
            longest = max(range(len(blocks)), key=lambda index: self.lengths[blocks[index]].max())
            blocks[0], blocks[longest] = blocks[longest], blocks[0]
        order = [*blocks, *([] if self.drop_last else rest)]
        return iter(np.concatenate(order).tolist() if order else [])


def make_sampler(
    rows: Dataset | IterableDataset, group_by: str, batch_size: int, world_size: int, seed: int, drop_last: bool
) -> GroupedSampler | None:
    """
    The sampler that `group_by` asks for, from the columns `length` and `num_images` of the rows; `None` (with a warning
    when they are missing: a stream, or rows that were not checked) leaves the choice to `transformers`.
    """
    if group_by == "none":
        return None
    if isinstance(rows, IterableDataset):
        logger.warning(f"group_by={group_by} has no effect on streamed rows: they come in their own order.")
        return None
    needed = ["length"] + ["num_images"] * (group_by == "modality_length")
    missing = [column for column in needed if column not in rows.column_names]
    if missing:
        logger.warning(
            f"group_by={group_by} has no effect: the lengths of the rows are unknown (set check_rows to true)."
        )
        return None
    has_images = np.asarray(rows["num_images"]) > 0 if group_by == "modality_length" else None
    return GroupedSampler(np.asarray(rows["length"]), batch_size, world_size, has_images, seed, drop_last)
