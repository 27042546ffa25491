"""`aligngpt score`: a data set in, the same data set with `clip_score` and `align_level` out.

The pairs are scored in blocks, shared out between the processes that accelerate started. The scores of each block are
written whole to `<output>.partial` as soon as they are done. A run that was killed and is started again with the same
settings, by however many processes, goes on with the blocks that are missing and ends with the same bytes.

A block is always scored in the same batches, so that its scores do not depend on who scores it. (On a CPU the number
of threads may change the last bit of a matrix product: `OMP_NUM_THREADS` is part of what makes runs identical there.)
"""

import contextlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers

from aligngpt_shared.locks import lock
from aligngpt_shared.records import ALIGNMENT, versioned
from modeling_aligngpt.configuration_aligngpt import VERSION

from ..data.columns import mapping_of
from ..data.conversations import REASON_KINDS
from ..data.load import read_rows
from .config import ScoreConfig, read_edges, warn_of_other_scorer
from .output import (
    STATUSES,
    WITHOUT_IMAGE,
    Scores,
    assign_levels,
    gather_scores,
    print_summary,
    refuse_unscored,
    remove_leftovers,
    warn_of_levels,
    write_output,
)
from .processes import Processes, keeping_progress
from .scorer import PairScorer
from .shards import finished_blocks, score_blocks, write_scores
from .sheet import lengths_and_scores, sources_and_scores
from .source import WholeSource, refuse_other_rows


__all__ = ["ScoreConfig", "score_dataset"]

logger = logging.getLogger(__name__)

SETTINGS = "settings.json"


def score_dataset(config: ScoreConfig) -> dict[str, Any]:
    """Scores every pair, cuts the levels, writes the output folder and prints a table of the levels.

    Started by `accelerate launch` or `torchrun`, the processes share the work; the main one writes the output.

    Returns:
        What alignment.json holds: method, edges, counts, mean score of each level, scorer, counts of rows.

    Raises:
        ValueError: unusable settings, rows, images or scorer; an output that exists or that another run writes.
        OSError: something cannot be written; what was scored before is kept.
    """
    processes = Processes(config.device)
    partial = _beside(config, "partial")
    processes.flag = partial / "failed"
    with contextlib.ExitStack() as stack:
        if not processes.is_main:
            stack.enter_context(_quiet())
        with processes.together():
            edges, earlier = read_edges(config)
            if processes.is_main:
                stack.enter_context(lock(_beside(config, "lock")))
                _refuse_existing(config, partial)
        with processes.together():
            source, scorer = _open_source(config), None
            if config.scorer is not None:
                scorer = PairScorer(
                    config.scorer,
                    revision=config.scorer_revision,
                    dtype=config.dtype,
                    device=processes.device,
                    by_parts=config.conversations,
                )
        with processes.together():
            identity, finished = None, None
            if processes.is_main:
                identity = _column_identity(config) if scorer is None else scorer.identity()
                warn_of_other_scorer(earlier, identity)
                settings: dict[str, Any] = {
                    **identity,
                    "batch_size": config.batch_size,
                    "shard_size": config.shard_size,
                    **({"conversations": True} if config.conversations else {}),
                    **source.settings(),
                }
                finished = _open_partial(partial, settings, config)
        finished, done = processes.from_main((finished, sorted(finished_blocks(partial))))
        if finished is not None:
            return finished
        with processes.together():
            if scorer is not None:
                score_blocks(source, scorer, config, processes, partial, set(done))
            elif processes.is_main:
                _write_column(source, config, edges and len(edges), partial)
        del scorer
        with processes.together():
            record = _finish(source, identity, edges, config, partial) if processes.is_main else None
        return processes.from_main(record)


def _beside(config: ScoreConfig, what: str) -> Path:
    output = Path(config.output)
    return output.with_name(f"{output.name}.{what}")


@contextlib.contextmanager
def _quiet():
    """The other processes say what the main one says: once is enough."""
    package = logging.getLogger(__package__)
    level = package.level
    package.setLevel(logging.ERROR)
    try:
        yield
    finally:
        package.setLevel(level)


def _refuse_existing(config: ScoreConfig, partial: Path):
    output = Path(config.output)
    if config.overwrite:
        return
    # with progress beside it, the output may be this run's own: see _open_partial
    if output.exists() and not (partial / SETTINGS).is_file():
        raise ValueError(f"output {config.output!r} exists: choose another folder or set overwrite.")
    for name in ("json_output", "parquet_output"):
        path = getattr(config, name)
        if path and Path(path).exists() and not (partial / SETTINGS).is_file():
            raise ValueError(f"{name} {path!r} exists: choose another file or set overwrite.")


def _open_source(config: ScoreConfig) -> WholeSource:
    columns = mapping_of(config.columns) | ({"clip_score": config.from_column} if config.from_column else {})
    rows, report = read_rows(
        config.dataset,
        name=config.dataset_config,
        split=config.dataset_split,
        revision=config.dataset_revision,
        image_folder=config.image_folder,
        on_bad_row=config.on_bad_row,
        columns=columns,
        keep_columns=True,
    )
    if config.on_bad_row == "raise":
        refuse_other_rows(rows, report, config.conversations)
    return WholeSource(rows, report, config.shard_size)


def _open_partial(partial: Path, settings: dict[str, Any], config: ScoreConfig) -> dict[str, Any] | None:
    """Makes the folder of progress, or checks that what is there was made with the same settings.

    Returns:
        The record of the output, where a run with these settings finished it and was killed while tidying up.
    """
    output, note = Path(config.output), partial / SETTINGS
    settings = json.loads(json.dumps(settings))  # lists for tuples, as in the file
    remove_leftovers(output)
    (partial / "failed").unlink(missing_ok=True)
    if note.is_file():
        earlier = json.loads(note.read_text(encoding="utf-8"))
        changed = [name for name in settings if settings[name] != earlier.get(name)]
        if not changed and (config.overwrite or not output.exists()):
            return None
        if not config.overwrite:
            if output.exists():
                if not changed and (output / ALIGNMENT).is_file():
                    shutil.rmtree(partial)
                    return json.loads((output / ALIGNMENT).read_text(encoding="utf-8"))
                raise ValueError(f"output {config.output!r} exists: choose another folder or set overwrite.")
            raise ValueError(
                f"{partial} keeps the progress of a run with other settings ({', '.join(changed)} changed). Delete "
                "that folder or set overwrite to begin anew, or go back to the earlier settings to resume."
            )
    if partial.exists():
        shutil.rmtree(partial)
    with keeping_progress(f"folder {partial}", partial):
        partial.mkdir(parents=True)
        beside = partial / f"{SETTINGS}.tmp"
        beside.write_text(json.dumps(settings, indent=2), encoding="utf-8")
        beside.replace(note)
    return None


def _column_identity(config: ScoreConfig) -> dict[str, Any]:
    """What `PairScorer.identity` says of a scorer, of a column."""
    return {
        "scorer": f"column {config.from_column}",
        "revision": None,
        "sha256": None,
        "architecture": None,
        "dtype": "float32",
        "lower_is_better": config.lower_is_better,
        "preprocessing": {"max_text_tokens": None},
    }


def _write_column(source: WholeSource, config: ScoreConfig, num_edges: int | None, partial: Path):
    """The shard files of numbers that the rows came with, in place of a scorer's."""
    values = source.rows.select_columns(["clip_score"]).with_format("arrow")[:]["clip_score"].to_numpy()
    values = -values if config.lower_is_better else values
    levels = config.num_align_levels or (num_edges - 1 if num_edges else 8)
    distinct = len(np.unique(values[np.isfinite(values)]))
    if config.binning in ("uniform", "robust", "quantile") and 1 < distinct < levels:
        raise ValueError(
            f"from_column: {config.from_column} holds {distinct} different values, too few for {levels} levels. Take "
            "its whole numbers as they are (--binning values), or fewer levels (--num_align_levels)."
        )
    reasons = source.unpaired(config.conversations)
    for number, block in enumerate(source.blocks(partial)):
        part = slice(number * source.shard_size, (number + 1) * source.shard_size)
        write_scores(values[part], reasons[part], partial / f"{block}.parquet")


def _finish(
    source: WholeSource,
    identity: dict[str, Any],
    edges: list[float] | None,
    config: ScoreConfig,
    partial: Path,
) -> dict[str, Any]:
    """From the shard files to the output; the main process alone. `edges`: an earlier run's."""
    blocks = source.blocks(partial)
    source.check_complete(partial)
    scores = gather_scores(partial, blocks, config.conversations)
    if not len(scores.values):
        raise ValueError(f"{config.dataset}: no rows.")
    refuse_unscored(source, scores, partial, blocks, config.on_bad_row)
    cut = assign_levels(scores, config, edges)
    record = {
        **cut,
        **identity,
        "batch_size": config.batch_size,
        "dataset": Path(config.dataset).name if Path(config.dataset).exists() else config.dataset,
        "dataset_revision": config.dataset_revision,
        "rows": _count_rows(source, scores),
        "length": lengths_and_scores(source.rows, scores.values, scores.levels),
        "sources": sources_and_scores(source.rows, scores.values, scores.levels),
        "versions": {
            "aligngpt": VERSION,
            **{module.__name__: module.__version__ for module in (torch, transformers, datasets, np)},
        },
    }
    record = json.loads(json.dumps(versioned(record)))  # as it will be read again
    write_output(Path(config.output), source, blocks, scores, record, config, partial)
    shutil.rmtree(partial)
    print_summary(record, Path(config.output))
    warn_of_levels(scores, record)
    return record


def _count_rows(source: WholeSource, scores: Scores) -> dict[str, int]:
    """How many rows were read, scored and written, how many have each other status, how many captions were cut."""
    statuses = {status: scores.count(status) for status in STATUSES}
    for _, _, reason in source.report.dropped:
        statuses[reason.kind] += 1
    read = len(scores.values) + len(source.report.dropped)
    written = statuses.pop("written") + statuses[WITHOUT_IMAGE]
    return {
        "read": read,
        "scored": read - sum(statuses[kind] for kind in (*REASON_KINDS, WITHOUT_IMAGE)),
        "written": written,
        **statuses,
        "captions_cut": scores.captions_cut,
    }
