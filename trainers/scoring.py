"""`aligngpt score`: a data set in, the same data set with `clip_score` and `align_level` out.

The pairs are scored in shards, each written whole to `<output>.partial` as soon as it is done. A run that was killed
and is started again with the same settings goes on behind the last finished shard and ends with the same bytes.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import transformers
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .alignment import METHODS, PairPreprocessor, PairScorer, cut_levels
from .conversations import caption_of
from .data import RowReport, load_image, read_rows


logger = logging.getLogger(__name__)

RECORD = "alignment.json"
SHARD_SCHEMA = pa.schema(
    [("row", pa.int64()), ("clip_score", pa.float32()), ("caption_cut", pa.bool_()), ("error", pa.string())]
)


@dataclass
class ScoreConfig:
    """What `aligngpt score` is asked to do.

    The score of a pair is the cosine similarity of its picture and its caption under the scorer; levels are cut from
    the scores by `binning` (see `alignment.cut_levels`).
    """

    dataset: str = field(
        metadata={"help": "A LLaVA JSON/JSONL, CSV, TSV or parquet file, a folder, or a Hub id of image-text pairs."}
    )
    scorer: str = field(metadata={"help": "Folder or Hub id of the CLIP or SigLIP model that scores."})
    output: str = field(metadata={"help": "Folder to write: a data set for `load_from_disk` and alignment.json."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_split: str | None = field(default=None, metadata={"help": "Split; by default train, or the only one."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of a Hub data set."})
    image_folder: str | None = field(
        default=None, metadata={"help": "What relative picture paths start from; by default the data file's folder."}
    )
    on_bad_row: str = field(
        default="raise", metadata={"help": "raise: refuse unusable rows and pictures; skip: leave them out and count."}
    )
    scorer_revision: str | None = field(default=None, metadata={"help": "Revision of a scorer on the Hub."})
    num_align_levels: int | None = field(
        default=None, metadata={"help": "Number of alignment levels N; by default 8, or what `edges` say."}
    )
    binning: str = field(
        default="uniform",
        metadata={"help": "uniform: intervals of equal width; quantile: equally many pairs; edges: those of `edges`."},
    )
    edges: list[str] | None = field(
        default=None,
        metadata={"help": "For binning=edges: the N+1 edges, or the alignment.json (or folder) of an earlier run."},
    )
    batch_size: int = field(default=128, metadata={"help": "Pairs encoded at once."})
    dtype: str = field(default="float32", metadata={"help": "Dtype of the scorer: float32, bfloat16 or float16."})
    device: str | None = field(default=None, metadata={"help": "By default the GPU where there is one, else cpu."})
    num_workers: int | None = field(
        default=None, metadata={"help": "Processes that decode pictures; by default 0 on a CPU, up to 8 for a GPU."}
    )
    shard_size: int = field(default=2048, metadata={"help": "Pairs after which progress is kept."})
    embed_images: bool = field(
        default=True, metadata={"help": "Copy the pictures into the output; false keeps their paths."}
    )
    overwrite: bool = field(
        default=False, metadata={"help": "Replace an existing output, and kept progress of other settings."}
    )

    def __post_init__(self):
        if self.on_bad_row not in ("raise", "skip"):
            raise ValueError(f"on_bad_row must be raise or skip, not {self.on_bad_row!r}.")
        if self.binning not in METHODS:
            raise ValueError(f"binning must be one of {', '.join(METHODS)}, not {self.binning!r}.")
        if (self.edges is not None) != (self.binning == "edges"):
            raise ValueError("`edges` and `binning: edges` belong together: give both or neither.")
        for name in ("batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")


def score_dataset(config: ScoreConfig) -> dict[str, Any]:
    """Scores every pair, cuts the levels, writes the output folder and prints a table of the levels.

    Returns:
        What alignment.json holds: method, edges, counts, mean score of each level, scorer, counts of rows.

    Raises:
        ValueError: unusable settings, rows, pictures or scorer; an output that exists.
    """
    output = Path(config.output)
    if output.exists() and not config.overwrite:
        raise ValueError(f"output {config.output!r} exists: choose another folder or set overwrite.")
    edges = _read_edges(config)
    rows, report = read_rows(
        config.dataset,
        name=config.dataset_config,
        split=config.dataset_split,
        revision=config.dataset_revision,
        image_folder=config.image_folder,
        on_bad_row=config.on_bad_row,
    )
    captions = _captions(rows, report)
    scorer = PairScorer(config.scorer, revision=config.scorer_revision, dtype=config.dtype, device=config.device)
    identity = scorer.identity()
    partial = output.with_name(output.name + ".partial")
    settings = {
        **identity,
        "batch_size": config.batch_size,
        "shard_size": config.shard_size,
        "data": _data_digest(rows, captions),
    }
    _open_partial(partial, settings, config.overwrite)
    scored = _score_shards(rows, captions, report.kept, scorer, config, partial)
    unreadable = scored.filter(pc.is_valid(scored["error"]))
    if len(unreadable) and config.on_bad_row == "raise":
        raise ValueError(_describe_unreadable(unreadable, len(rows), partial))
    if len(unreadable) == len(rows):
        raise ValueError(f"No picture could be read. {unreadable['error'][0].as_py()}")
    scores = scored["clip_score"].to_numpy()
    good = np.flatnonzero(~scored["error"].is_valid().to_numpy())
    if not np.isfinite(scores[good]).all():
        row = report.kept[good[~np.isfinite(scores[good])][0]]
        raise ValueError(f"row {row}: the score is not finite; with a 16-bit dtype, score in float32.")
    levels, edges, counts = cut_levels(scores[good], config.num_align_levels, config.binning, edges)
    record = {
        "method": config.binning,
        "num_align_levels": len(counts),
        "edges": edges.tolist(),
        "counts": counts.tolist(),
        "mean_scores": [float(scores[good][levels == k].mean()) if n else None for k, n in enumerate(counts)],
        **identity,
        "batch_size": config.batch_size,
        "rows": {
            "read": report.total,
            "scored": len(good),
            "unusable": len(report.dropped),
            "unreadable_pictures": len(unreadable),
            "captions_cut": int(np.count_nonzero(scored["caption_cut"].to_numpy()[good])),
        },
        "dropped": [{"row": n, "reason": why} for n, _, why in report.dropped]
        + [{"row": entry["row"], "reason": entry["error"]} for entry in unreadable.to_pylist()],
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, datasets, np)},
    }
    _write_output(output, rows, report.kept, scores, good, levels, record, config)
    shutil.rmtree(partial)
    _print_summary(record)
    return record


def _read_edges(config: ScoreConfig) -> list[float] | None:
    """The edges as numbers, from a list of them or from an earlier run's alignment.json."""
    if config.edges is None:
        return None
    given = [config.edges] if isinstance(config.edges, (str, os.PathLike)) else list(config.edges)
    try:
        return [float(edge) for edge in given]
    except (TypeError, ValueError):
        path = Path(given[0])
    path = path / RECORD if path.is_dir() else path
    if len(given) > 1 or not path.is_file():
        raise ValueError(f"edges {config.edges!r}: neither numbers nor an existing {RECORD}.")
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        edges = earlier["edges"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"edges: {path} is no {RECORD} of an earlier run ({type(error).__name__}: {error})."
        ) from error
    if Path(config.scorer).name != Path(str(earlier.get("scorer"))).name:
        logger.warning("The edges of %s were made by scorer %s, not %s.", path, earlier.get("scorer"), config.scorer)
    return edges


def _captions(rows: Dataset, report: RowReport) -> list[str]:
    """Each row's caption; refuses rows that do not have exactly one picture."""
    captions = []
    for number, messages in zip(report.kept, rows["messages"], strict=True):
        pictures = sum(block["type"] == "image" for message in messages for block in message["content"])
        if pictures != 1:
            raise ValueError(
                f"row {number}: {pictures} pictures; a pair to score has one picture and one text. Score stage-1 pairs "
                "alone; conversations of stage 2 need no level."
            )
        captions.append(caption_of(messages))
    return captions


def _data_digest(rows: Dataset, captions: list[str]) -> str:
    """SHA-256 of captions and pictures: embedded bytes, or path, size and time of change of files."""
    digest = hashlib.sha256()
    for caption, images in zip(captions, _iterate_images(rows), strict=True):
        digest.update(caption.encode() + b"\0")
        content = images[0]["bytes"]
        if content is None:
            path = images[0]["path"]
            status = os.stat(path) if os.path.exists(path) else None
            content = repr((path, status and (status.st_size, status.st_mtime_ns))).encode()
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def _iterate_images(rows: Dataset) -> Iterator[list[dict[str, Any]]]:
    """Each row's pictures, undecoded."""
    for batch in rows.select_columns(["images"]).with_format("arrow").iter(batch_size=256):
        yield from batch["images"].to_pylist()


def _open_partial(partial: Path, settings: dict[str, Any], overwrite: bool):
    """Makes the folder of progress, or checks that what is there was made with the same settings."""
    note = partial / "settings.json"
    if note.is_file():
        earlier = json.loads(note.read_text(encoding="utf-8"))
        changed = [name for name in settings if settings[name] != earlier.get(name)]
        if not changed:
            return
        if not overwrite:
            raise ValueError(
                f"{partial} keeps the progress of a run with other settings ({', '.join(changed)} changed). Delete "
                "that folder or set overwrite to begin anew, or go back to the earlier settings to resume."
            )
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    beside = partial / "settings.json.tmp"
    beside.write_text(json.dumps(settings, indent=2), encoding="utf-8")
    beside.replace(note)


class _Batches(torch.utils.data.Dataset):
    """Decoded and prepared batches, by (first row, behind the last row)."""

    def __init__(self, rows: Dataset, captions: list[str], numbers: list[int], preprocess: PairPreprocessor):
        self.images = rows.select_columns(["images"]).with_format("arrow")
        self.captions, self.numbers, self.preprocess = captions, numbers, preprocess

    def __getitem__(self, span: tuple[int, int]) -> dict[str, Any]:
        images, texts, errors = [], [], []
        for row, pictures in zip(range(*span), self.images[span[0] : span[1]]["images"].to_pylist(), strict=True):
            try:
                images.append(load_image(pictures[0], self.numbers[row]))
                texts.append(self.captions[row])
                errors.append(None)
            except ValueError as error:
                errors.append(str(error))
        return {"span": span, "errors": errors, "inputs": self.preprocess(images, texts) if images else None}


def _score_shards(
    rows: Dataset, captions: list[str], numbers: list[int], scorer: PairScorer, config: ScoreConfig, partial: Path
) -> pa.Table:
    """Scores what no shard file holds yet; returns the scores of all rows in their order."""
    files = {
        start: partial / f"shard-{start // config.shard_size:06d}.parquet"
        for start in range(0, len(rows), config.shard_size)
    }
    done = sum(min(config.shard_size, len(rows) - start) for start, file in files.items() if file.is_file())
    spans = [
        (first, min(first + config.batch_size, start + config.shard_size, len(rows)))
        for start, file in files.items()
        if not file.is_file()
        for first in range(start, min(start + config.shard_size, len(rows)), config.batch_size)
    ]
    workers = config.num_workers
    if workers is None:
        workers = 0 if scorer.device.type == "cpu" else min(8, os.cpu_count() or 1)
    batches = DataLoader(
        _Batches(rows, captions, numbers, scorer.preprocess),
        batch_size=None,
        sampler=spans,
        num_workers=workers,
        pin_memory=scorer.device.type == "cuda",
    )
    if done:
        logger.warning("Resuming: %d of %d pairs are scored already.", done, len(rows))
    shard: list[pa.Table] = []
    with tqdm(total=len(rows), initial=done, desc="Scoring", unit="pair") as bar:
        for batch in batches:
            shard.append(_score_batch(batch, numbers, scorer))
            bar.update(len(shard[-1]))
            start, stop = batch["span"]
            if stop % config.shard_size == 0 or stop == len(rows):
                file = files[start // config.shard_size * config.shard_size]
                pq.write_table(pa.concat_tables(shard), file.with_suffix(".tmp"))
                file.with_suffix(".tmp").replace(file)
                shard = []
    return pa.concat_tables(pq.read_table(file, schema=SHARD_SCHEMA) for file in files.values())


def _score_batch(batch: dict[str, Any], numbers: list[int], scorer: PairScorer) -> pa.Table:
    errors = batch["errors"]
    scores = np.full(len(errors), np.nan, dtype=np.float32)
    cut = np.zeros(len(errors), dtype=bool)
    good = [position for position, error in enumerate(errors) if error is None]
    if good:
        image_inputs, text_inputs, cut[good] = batch["inputs"]
        scores[good] = scorer.score(image_inputs, text_inputs)
    rows = numbers[batch["span"][0] : batch["span"][1]]
    return pa.table([pa.array(rows), pa.array(scores), pa.array(cut), pa.array(errors, pa.string())], SHARD_SCHEMA)


def _describe_unreadable(unreadable: pa.Table, total: int, partial: Path) -> str:
    shown = [f"  {error}" for error in unreadable["error"].slice(0, 5).to_pylist()]
    if len(unreadable) > 5:
        shown.append(f"  ... and {len(unreadable) - 5} more")
    return (
        f"{len(unreadable)} of {total} pictures cannot be read:\n"
        + "\n".join(shown)
        + "\nSet on_bad_row to skip to leave "
        f"them out (the finished scores in {partial.name} are used again), or repair the files and begin anew."
    )


def _write_output(
    output: Path,
    rows: Dataset,
    kept: list[int],
    scores: np.ndarray,
    good: np.ndarray,
    levels: np.ndarray,
    record: dict[str, Any],
    config: ScoreConfig,
):
    """Writes the data set and its record beside `output`, then renames."""
    # the columns are joined to the whole table, before anything is selected: no picture is copied until the saving
    whole = Dataset(rows.data, info=rows.info.copy(), fingerprint=rows._fingerprint)
    chosen = np.asarray(kept)[good]
    columns = {"clip_score": np.full(len(whole), np.nan, np.float32), "align_level": np.full(len(whole), -1, np.int64)}
    columns["clip_score"][chosen], columns["align_level"][chosen] = scores[good], levels
    whole = whole.remove_columns([name for name in columns if name in whole.column_names])
    for name, values in columns.items():
        whole = whole.add_column(name, values)
    rows = whole.select(chosen) if len(chosen) < len(whole) else whole
    if not config.embed_images:
        rows = _paths_only(rows)
    beside = output.with_name(f"{output.name}.tmp-{os.getpid()}")
    rows.save_to_disk(str(beside))
    (beside / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if output.exists():
        old = output.with_name(f"{output.name}.old-{os.getpid()}")
        output.rename(old)
        beside.rename(output)
        shutil.rmtree(old)
    else:
        beside.rename(output)


def _paths_only(rows: Dataset) -> Dataset:
    """`images` as lists of absolute paths, which `load_rows` reads."""
    paths = []
    for number, images in enumerate(_iterate_images(rows)):
        if images[0]["bytes"] is not None:
            raise ValueError(f"row {number}: the picture is stored in the data set, so embed_images cannot be false.")
        paths.append([os.path.abspath(images[0]["path"])])
    return rows.remove_columns("images").add_column("images", paths)


def _print_summary(record: dict[str, Any]):
    """A line for each level: its interval, how many pairs it holds and their mean score."""
    print(f"{'level':>5}  {'interval':<20} {'pairs':>9} {'share':>7}  mean score")
    total = sum(record["counts"])
    for level, count in enumerate(record["counts"]):
        low, high = record["edges"][level : level + 2]
        interval = f"[{low:.4f}, {high:.4f}{']' if level == record['num_align_levels'] - 1 else ')'}"
        mean = record["mean_scores"][level]
        print(f"{level:>5}  {interval:<20} {count:>9,} {count / total:>7.2%}  {'-' if mean is None else f'{mean:.4f}'}")
    rows = record["rows"]
    print(
        f"{rows['scored']:,} of {rows['read']:,} rows scored; {rows['unusable']:,} unusable, "
        f"{rows['unreadable_pictures']:,} with an unreadable picture; {rows['captions_cut']:,} captions cut at "
        f"{record['max_text_tokens']} tokens."
    )
    empty = [str(level) for level, count in enumerate(record["counts"]) if not count]
    if empty:
        logger.warning(
            "No pair has level %s: stage 1 cannot train its embedding. Fewer levels or binning=quantile avoid that.",
            ", ".join(empty),
        )
