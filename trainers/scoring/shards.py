"""Blocks of pairs -> shard files of scores, each written whole or not at all."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .config import ScoreConfig
from .processes import Processes, default_workers, keeping_progress
from .scorer import PairScorer
from .source import Batches, Span


logger = logging.getLogger(__name__)

SHARD_SCHEMA = pa.schema([("clip_score", pa.float32()), ("caption_cut", pa.bool_()), ("error", pa.string())])
PREFETCH = 2  # batches that each worker prepares ahead


def finished_blocks(folder: Path) -> set[str]:
    """Names of the blocks whose scores are kept."""
    return {path.stem for path in folder.glob("shard-*.parquet")}


def score_blocks(
    source: Any, scorer: PairScorer, config: ScoreConfig, processes: Processes, folder: Path, done: set[str]
):
    """Scores this process's share of the blocks that are not done, a shard file for each.

    Args:
        source: of the pairs.
        scorer: the model.
        config: `batch_size`, `num_workers`.
        processes: who shares the work.
        folder: where the shard files go.
        done: blocks that are scored, the same in all processes.

    Raises:
        OSError: a shard cannot be written.
        ValueError: another process failed.
    """
    spans = _Spans(lambda: source.spans(done, config.batch_size, processes.rank, processes.count))
    workers = _choose_workers(config, scorer, processes)
    batches = DataLoader(
        Batches(source, scorer.preprocess, scorer.dtype, config.conversations),
        batch_size=None,
        sampler=spans,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        pin_memory=scorer.device.type == "cuda",
        worker_init_fn=_start_worker,
    )
    progress = _Progress(source.total, folder, done, config.shard_size, processes)
    shard: list[pa.Table] = []
    try:
        for span, table in _score_batches(batches, scorer, processes):
            shard.append(table)
            progress.add(len(table))
            if span.last:
                _write_shard(pa.concat_tables(shard), folder / f"{span.block}.parquet")
                shard = []
                progress.finish(span.block)
    finally:
        progress.close()


class _Spans(torch.utils.data.Sampler):
    """A sampler whose batches are made one by one."""

    def __init__(self, make: Any):
        self.make = make

    def __iter__(self) -> Iterator[Span]:
        return self.make()


def _start_worker(number: int):
    # each worker tokenizes alone: threads of its tokenizer would only take the cores of the others
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _choose_workers(config: ScoreConfig, scorer: PairScorer, processes: Processes) -> int:
    if config.num_workers is not None:
        return config.num_workers
    workers = default_workers(scorer.device, processes)
    size = getattr(getattr(scorer.model.config, "vision_config", None), "image_size", 224)
    need = config.batch_size * 3 * size * size * scorer.dtype.itemsize * PREFETCH * workers * processes.local_count
    try:
        room = os.statvfs("/dev/shm")
    except (OSError, AttributeError):
        return workers
    if workers and room.f_bavail * room.f_frsize < need:
        logger.warning(
            "Shared memory (/dev/shm) has no room for %d workers' batches (%d MB): images are decoded by the scoring "
            "process itself, which is slower. Give more (docker: --shm-size), or set num_workers and a smaller "
            "batch_size.",
            workers,
            need >> 20,
        )
        return 0
    return workers


def _score_batches(batches: DataLoader, scorer: PairScorer, processes: Processes) -> Iterator[tuple[Span, pa.Table]]:
    """Scores of each batch; the next batch is under way on the device before the last one's scores are fetched."""
    waiting: tuple[dict[str, Any], torch.Tensor | None] | None = None
    for batch in batches:
        processes.check()
        scores = scorer.score(*batch["inputs"][:2]) if batch["inputs"] else None
        if waiting is not None:
            yield waiting[0]["span"], _to_table(*waiting)
        waiting = batch, scores
        if batch["span"].last:  # nothing of the next block is scored before this one is kept
            yield waiting[0]["span"], _to_table(*waiting)
            waiting = None


def _to_table(batch: dict[str, Any], found: torch.Tensor | None) -> pa.Table:
    errors = batch["reasons"]
    scores = np.full(len(errors), np.nan, dtype=np.float32)
    cut = np.zeros(len(errors), dtype=bool)
    if found is not None:
        good = batch["scored"]
        scores[good], cut[good] = found.cpu().numpy(), batch["inputs"][2]
    return pa.table([pa.array(scores), pa.array(cut), pa.array(errors, pa.string())], SHARD_SCHEMA)


def write_scores(values: np.ndarray, reasons: list[str | None], path: Path):
    """A shard file of scores that are known already, NaN where a row has none, and of what is wrong with rows."""
    columns = [pa.array(values.astype(np.float32)), pa.array([False] * len(values)), pa.array(reasons, pa.string())]
    _write_shard(pa.table(columns, SHARD_SCHEMA), path)


def _write_shard(table: pa.Table, path: Path):
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with keeping_progress(f"shard {path.stem}", path.parent):
        try:
            with beside.open("wb") as file:
                pq.write_table(table, file)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        except OSError:
            beside.unlink(missing_ok=True)
            raise


class _Progress:
    """The bar of the main process; what the others do is seen by their shard files."""

    def __init__(self, total: int | None, folder: Path, done: set[str], shard_size: int, processes: Processes):
        self.folder, self.shard_size, self.count = folder, shard_size, processes.count
        self.known, self.own, self.shown_others = set(done), 0, 0
        before = sum(pq.read_metadata(folder / f"{block}.parquet").num_rows for block in done) if done else 0
        if before and processes.is_main:
            logger.warning("Resuming: %d%s pairs are scored already.", before, f" of {total}" if total else "")
        self.bar = tqdm(total=total, initial=before, desc="Scoring", unit="pair", disable=not processes.is_main)

    def add(self, pairs: int):
        self.bar.update(pairs)

    def finish(self, block: str):
        self.known.add(block)
        if self.count > 1 and not self.bar.disable:
            others = finished_blocks(self.folder) - self.known
            self.known |= others
            self.bar.update(len(others) * self.shard_size)

    def close(self):
        # a last, shorter block was counted as a whole one
        if self.bar.total is not None and self.bar.n > self.bar.total:
            self.bar.n = self.bar.total
        self.bar.close()


def read_shards(folder: Path, blocks: list[str]) -> Iterator[pa.Table]:
    """The shard files' tables, in order."""
    for block in blocks:
        yield pq.read_table(folder / f"{block}.parquet", schema=SHARD_SCHEMA)
