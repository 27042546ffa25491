"""Scores and levels -> the output: the data set, its record, the list of what was left out, an image, LLaVA JSON."""

import glob
import heapq
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset

from aligngpt_shared.files import move_folder
from aligngpt_shared.records import ALIGNMENT

from ..data.conversations import REASON_KINDS, Reason
from .config import ScoreConfig
from .levels import (
    QUANTILES,
    balance_levels,
    cut_levels,
    draw_histogram,
    faults_of_levels,
    mean_of_levels,
    remedy_for_levels,
)
from .llava_json import with_level_as_text, write_json
from .processes import keeping_progress
from .shards import read_shards
from .sheet import describe_sources, draw_sheet, word_about_length


logger = logging.getLogger(__name__)

# cuts whose end levels hold what lies outside the edges
OPEN_ENDED = ("robust", "edges")
DROPPED, HISTOGRAM, SHEET = "dropped.jsonl", "histogram.png", "pairs.png"
# what became of a row, as stored for each: the first and, of conversations, the last are in the output
WITHOUT_IMAGE = "without_image"
STATUSES = ("written", *REASON_KINDS, "below_min_score", "left_out_by_sampling", "below_kept_share", WITHOUT_IMAGE)


@dataclass
class Scores:
    """What the shard files hold, for all rows in their order.

    Attributes:
        values: [rows] float32, NaN where there is none.
        statuses: [rows] uint8, index into `STATUSES`.
        captions_cut: how many captions were longer than the text model takes.
        levels: [rows] int, -1 for rows that have none; None before the cut.
    """

    values: np.ndarray
    statuses: np.ndarray
    captions_cut: int
    levels: np.ndarray | None = None

    def count(self, status: str) -> int:
        """How many rows have this status."""
        return int(np.count_nonzero(self.statuses == STATUSES.index(status)))

    def written(self) -> np.ndarray:
        """[rows] bool, what is in the output."""
        return (self.statuses == 0) | (self.statuses == STATUSES.index(WITHOUT_IMAGE))


def gather_scores(folder: Path, blocks: list[str], conversations: bool = False) -> Scores:
    """Reads all shard files: 5 bytes a row stay in memory. Of conversations, rows may have neither score nor reason."""
    total = sum(pq.read_metadata(folder / f"{block}.parquet").num_rows for block in blocks)
    scores = Scores(np.empty(total, np.float32), np.zeros(total, np.uint8), 0)
    place = 0
    for table in read_shards(folder, blocks):
        scores.values[place : place + len(table)] = table["clip_score"].to_numpy()
        scores.captions_cut += pc.sum(table["caption_cut"]).as_py() or 0
        if table["error"].null_count < len(table):
            for position, reason in enumerate(table["error"].to_pylist()):
                if reason is not None:
                    scores.statuses[place + position] = STATUSES.index(Reason.read(reason).kind)
        place += len(table)
    if conversations:
        scores.statuses[(scores.statuses == 0) & np.isnan(scores.values)] = STATUSES.index(WITHOUT_IMAGE)
    return scores


def refuse_unscored(source: Any, scores: Scores, folder: Path, blocks: list[str], on_bad_row: str):
    """Raises at rows without a score where the settings say so, and at scores that are not finite."""
    counts = {kind: scores.count(kind) for kind in REASON_KINDS}
    total, missing = len(scores.values), sum(counts.values())
    if missing and (on_bad_row == "raise" or missing == total):
        shown = []
        for entry in dropped_rows(source, scores, folder, blocks, None, None):
            shown.append(f"  row {entry['row']}: {entry['reason']}")
            if len(shown) == 5:
                break
        more = f"\n  ... and {missing - 5} more" if missing > 5 else ""
        kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
        remedy = (
            "\nSet on_bad_row to skip to leave them out (the finished scores in "
            f"{folder.name} are used again), or repair the data and begin anew."
        )
        raise ValueError(
            f"{missing} of {total} rows have no score ({kinds}):\n"
            + "\n".join(shown)
            + more
            + ("" if missing == total else remedy)
        )
    broken = np.flatnonzero((scores.statuses == 0) & ~np.isfinite(scores.values))
    if len(broken):
        raise ValueError(
            f"row {source.number(int(broken[0]))}: the score is not finite; with a 16-bit dtype, score in float32."
        )


def assign_levels(scores: Scores, config: ScoreConfig, edges: list[float] | None) -> dict[str, Any]:
    """Filters, cuts and balances; fills `scores.levels` and `scores.statuses`.

    Returns:
        What the record says about it: method, edges, counts, mean scores, filter and sampling.

    Raises:
        ValueError: nothing left to cut, or scores that cannot be cut.
    """
    if config.min_score is not None:
        with np.errstate(invalid="ignore"):
            low = (scores.statuses == 0) & (scores.values < config.min_score)
        scores.statuses[low] = STATUSES.index("below_min_score")
    good = scores.statuses == 0
    if not good.any():
        if np.isnan(scores.values).all():
            raise ValueError("No row has an image: there is nothing to score.")
        best = np.nanmax(scores.values)
        raise ValueError(f"No pair scores {config.min_score} or more (the best has {best:.4f}): lower min_score.")
    levels, bounds, counts = cut_levels(
        scores.values[good], config.num_align_levels, config.binning, edges, config.quantiles or QUANTILES
    )
    if config.keep is not None:
        # after the cut, so that a level means what it means among all rows: benchmarks/levels/README.md
        kept = _keep_best(scores, good, config.keep)
        levels, good = levels[kept], scores.statuses == 0
        counts = np.bincount(levels, minlength=len(counts))
    sampling = None
    if config.sampling == "balanced":
        kept = balance_levels(levels, counts, config.samples_per_level, config.seed)
        before, levels = counts, np.where(kept, levels, -1).astype(levels.dtype)
        counts = np.bincount(levels[kept], minlength=len(counts))
        sampling = {
            "method": "balanced",
            "samples_per_level": config.samples_per_level or int(before[before > 0].min()),
            "seed": config.seed,
            "counts_before": before.tolist(),
        }
        scores.statuses[np.flatnonzero(good)[~kept]] = STATUSES.index("left_out_by_sampling")
        if counts.sum() < 0.5 * before.sum():
            logger.warning(
                "Balanced sampling keeps %d of %d pairs, because the smallest levels hold few. More remain with "
                "samples_per_level (smaller levels then keep all they have) or with binning=robust or quantile.",
                counts.sum(),
                before.sum(),
            )
    scores.levels = np.full(len(scores.values), -1, levels.dtype)
    scores.levels[good] = levels
    return {
        "method": config.binning,
        **({"quantiles": config.quantiles} if config.quantiles else {}),
        "num_align_levels": len(counts),
        "edges": bounds.tolist(),
        "counts": counts.tolist(),
        "mean_scores": mean_of_levels(scores.values, scores.levels, len(counts)),
        "min_score": config.min_score,
        "keep": config.keep,
        "sampling": sampling,
    }


def _keep_best(scores: Scores, good: np.ndarray, share: float) -> np.ndarray:
    """Leaves out all but the best `share` of the scored rows, of equal scores the later ones; [good rows] bool."""
    rows = np.flatnonzero(good)
    order = np.argsort(-scores.values[rows], kind="stable")
    left = order[max(1, round(share * len(rows))) :]
    scores.statuses[rows[left]] = STATUSES.index("below_kept_share")
    kept = np.ones(len(rows), bool)
    kept[left] = False
    return kept


def dropped_rows(
    source: Any, scores: Scores, folder: Path, blocks: list[str], rows: Dataset | None, min_score: float | None
) -> Iterator[dict[str, Any]]:
    """What is not in the output, in the order of the source: row, id, kind and reason.

    Args:
        source: what was scored.
        scores: of it.
        folder: of the shard files, which hold the reasons.
        blocks: their names.
        rows: where the ids are; None leaves them out.
        min_score: of the filter.
    """
    unread = (
        {"row": number, "id": None if name is None else str(name), "kind": reason.kind, "reason": str(reason)}
        for number, name, reason in source.report.dropped
    )
    ids = rows.select_columns(["id"]).with_format("arrow") if rows is not None and "id" in rows.column_names else None

    def unused() -> Iterator[dict[str, Any]]:
        place, missing = 0, ~scores.written()
        for table in read_shards(folder, blocks):
            places = np.flatnonzero(missing[place : place + len(table)])
            if len(places):
                reasons = table["error"].take(places).to_pylist()
                names = ids[places + place]["id"].to_pylist() if ids is not None else [None] * len(places)
                for position, reason, name in zip((places + place).tolist(), reasons, names, strict=True):
                    kind = STATUSES[scores.statuses[position]]
                    if reason is None:
                        why = {
                            "below_min_score": f"below min_score {min_score}",
                            "below_kept_share": "is not among the share to keep",
                        }
                        reason = f"score {scores.values[position]:.6f} {why.get(kind, 'in a full level')}"
                    else:
                        reason = str(Reason.read(reason))
                    yield {"row": source.number(position), "id": name, "kind": kind, "reason": reason}
            place += len(table)

    yield from heapq.merge(unread, unused(), key=lambda entry: entry["row"])


def write_output(
    output: Path,
    source: Any,
    blocks: list[str],
    scores: Scores,
    record: dict[str, Any],
    config: ScoreConfig,
    folder: Path,
):
    """Writes everything beside `output`, then renames: the output is there whole or not at all."""
    rows = source.all_rows(blocks)
    beside = output.with_name(f"{output.name}.tmp-{os.getpid()}")
    with keeping_progress(f"output {output}", folder):
        try:
            with _in_place(beside / DROPPED) as file:
                for entry in dropped_rows(source, scores, folder, blocks, rows, config.min_score):
                    file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            good = scores.levels >= 0
            title = f"{record['scorer']}: {int(good.sum()):,} pairs, {record['method']} levels"
            edges, counts = np.array(record["edges"]), np.array(record["counts"])
            draw_histogram(scores.values[good], edges, counts, title, _meaning(record), beside / HISTOGRAM)
            if config.json_output:
                write_json(Path(config.json_output), rows, scores.values, scores.levels, scores.written(), config)
            scored = _with_levels(rows, scores, config)
            if config.parquet_output:
                _write_parquet(_as_text(scored) if config.as_text else scored, Path(config.parquet_output))
            draw_sheet(rows, scores.levels, f"{title}, some of each level", beside / SHEET)
            scored.save_to_disk(str(beside))
            (beside / ALIGNMENT).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            move_folder(beside, output)
        except OSError:
            shutil.rmtree(beside, ignore_errors=True)
            raise


def _meaning(record: dict[str, Any]) -> str:
    """What a score of this run is."""
    scorer = str(record["scorer"])
    return scorer if scorer.startswith("column ") else "cosine similarity of image and caption"


def _in_place(path: Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("w", encoding="utf-8")


def remove_leftovers(output: Path):
    """What a killed run left beside the output. Only for who holds the lock."""
    for path in output.parent.glob(f"{glob.escape(output.name)}.*-*"):
        if re.fullmatch(rf"{re.escape(output.name)}\.(tmp|old)-\d+", path.name):
            shutil.rmtree(path, ignore_errors=True)


def _with_levels(rows: Dataset, scores: Scores, config: ScoreConfig) -> Dataset:
    """The rows of the output with `clip_score` and `align_level`."""
    # the columns are joined to the whole table, before anything is selected: no image is copied until the saving
    columns: dict[str, Any] = {"clip_score": scores.values, "align_level": scores.levels.astype(np.int64)}
    if scores.count(WITHOUT_IMAGE):
        none = scores.levels < 0
        columns = {name: pa.array(values, mask=none) for name, values in columns.items()}
    whole = rows.remove_columns([name for name in columns if name in rows.column_names])
    for name, values in columns.items():
        whole = whole.add_column(name, values)
    chosen = np.flatnonzero(scores.written())
    whole = whole.select(chosen) if len(chosen) < len(whole) else whole
    return whole if config.embed_images else _paths_only(whole)


def _as_text(rows: Dataset) -> Dataset:
    """The rows with their levels in their texts, too."""
    texts = rows.select_columns(["messages", "align_level"]).map(
        lambda row: {"messages": with_level_as_text(row["messages"], row["align_level"])}
    )
    feature = rows.features["messages"]
    return rows.remove_columns("messages").add_column("messages", texts["messages"][:], feature=feature)


def _write_parquet(rows: Dataset, path: Path):
    """One parquet file with the images inside, whole or not at all."""
    beside = path.with_name(f"{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    rows.to_parquet(str(beside))
    beside.replace(path)


def iterate_images(rows: Dataset) -> Iterator[list[dict[str, Any]]]:
    """Each row's images, undecoded."""
    for batch in rows.select_columns(["images"]).with_format("arrow").iter(batch_size=256):
        yield from batch["images"].to_pylist()


def _paths_only(rows: Dataset) -> Dataset:
    """`images` as lists of absolute paths, which `load_rows` reads."""
    paths = []
    for number, images in enumerate(iterate_images(rows)):
        if images and images[0]["bytes"] is not None:
            raise ValueError(f"row {number}: the image is stored in the data set, so embed_images cannot be false.")
        paths.append([os.path.abspath(image["path"]) for image in images])
    return rows.remove_columns("images").add_column("images", paths)


def print_summary(record: dict[str, Any], output: Path):
    """A line for each level: interval, pairs, share and mean score; then what became of the rows."""
    print(f"{'level':>5}  {'interval':<20} {'pairs':>9} {'share':>7}  mean score")
    total = sum(record["counts"])
    for level, count in enumerate(record["counts"]):
        low, high = record["edges"][level : level + 2]
        top = level == record["num_align_levels"] - 1
        if record["method"] in OPEN_ENDED:
            low, high = -np.inf if level == 0 else low, np.inf if top else high
        interval = f"[{low:.4f}, {high:.4f}{']' if top else ')'}"
        mean = record["mean_scores"][level]
        print(f"{level:>5}  {interval:<20} {count:>9,} {count / total:>7.2%}  {'-' if mean is None else f'{mean:.4f}'}")
    rows = record["rows"]
    shown = [name for name in STATUSES[1:] if rows[name] or name not in ("below_kept_share", WITHOUT_IMAGE)]
    left_out = ", ".join(f"{rows[name]:,} {name.replace('_', ' ')}" for name in shown)
    limit = record["preprocessing"]["max_text_tokens"]
    cut = "" if limit is None else f"; {rows['captions_cut']:,} captions cut at {limit} tokens"
    print(f"{rows['scored']:,} of {rows['read']:,} rows scored; {left_out}{cut}.")
    print(f"{rows['written']:,} pairs in {output}; {DROPPED} lists what was left out, {HISTOGRAM} shows the scores.")
    if word := word_about_length(record["length"]):
        print(word)
    for line in describe_sources(record["sources"]):
        print(line)
    print(f"Look at {output / SHEET} before you train: pairs of every level.")
    if record.get("conversations"):
        print(f"Next: aligngpt instruct --model STAGE1 --align_mode level --dataset {output} --output_dir OUT")
        return
    levels = record["num_align_levels"]
    size = "" if levels == 8 else f" --num_align_levels {levels}"
    print(f"Next: aligngpt init --llm LANGUAGE_MODEL --vision_tower VISION_TOWER{size} --output FRESH")
    print(f"      aligngpt pretrain --model FRESH --dataset {output} --output_dir OUT")


def warn_of_levels(scores: Scores, record: dict[str, Any]):
    """One line where a level holds too few rows or the top one too many, with the cut that mends it."""
    faults = "; ".join(faults_of_levels(record["counts"]))
    # what `keep` leaves out are the low levels, on purpose
    if not faults or record["keep"] is not None:
        return
    cut = (scores.levels >= 0) | (scores.statuses == STATUSES.index("left_out_by_sampling"))
    remedy = remedy_for_levels(scores.values[cut], record["counts"])
    aim = "To train stage 1 on these rows" if record["method"] == "edges" else "Remedy"
    logger.warning("%s. %s: %s.", faults[0].upper() + faults[1:], aim, remedy)
