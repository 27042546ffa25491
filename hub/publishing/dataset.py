"""
`aligngpt publish-data`: a scored data set to the Hub in one commit, with its card.

The rows travel as parquet with their images inside, written and sent file by file, so that no second copy of the
whole is needed here.
"""

import argparse
import hashlib
import io
import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, Image, List, load_from_disk
from datasets.info import DatasetInfo, DatasetInfosDict
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard, DatasetCardData
from tqdm.auto import tqdm

from aligngpt_shared.records import ALIGNMENT, read_record
from aligngpt_shared.references import is_hub_id
from modeling_aligngpt.images_aligngpt import image_size, read_image, shortened

from .card import PAPER, TAGS, describe_rows, levels_text, list_levels
from .figures import draw_histogram
from .image_metadata import has_place, texts_of_image, without_metadata
from .model import add_hub_arguments, describe, hub_settings
from .outgoing import check_contents, find_paths, stage_files
from .run_records import hub_link
from .samples import draw_samples
from .secret_scan import find_secrets, find_tokens, strings_in
from .upload import Upload, check_repo_id, upload_checked_folder


TEMPLATE = Path(__file__).with_name("data_card.md.jinja")
HISTOGRAM = "histogram.png"
SHARD_BYTES = 500 * 2**20
ROWS_AT_ONCE = 1000
MOST_FINDINGS = 50
STALE = ("data/*.parquet", "*.parquet", "histogram.png", "assets/level-*.png")
COLUMNS = {
    "images": "the image, as a list of one",
    "messages": "the conversation: a user's turn with the image, an assistant's with the text",
    "clip_score": "cosine similarity of image and text, -1 to 1",
    "align_level": "the level, 0 (loosely aligned) upwards",
    "id": "name of the row in its source",
}


def publish_dataset(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    dry_run: bool = False,
    license: str | None = None,
    languages: Sequence[str] = ("en",),
    source: str | None = None,
    message: str | None = None,
    token: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    keep_image_bytes: bool = False,
) -> Upload | None:
    """
    Publish what `aligngpt score` wrote.

    Args:
        folder: of the scored data set, with `alignment.json`.
        repo_id: USER/NAME, created where it does not exist.
        private: of a new repository.
        revision: branch to commit to; by default main.
        create_pr: open a pull request instead.
        tag: give the commit this tag.
        dry_run: check, show the card, send nothing.
        license: the Hub's name of the data's licence.
        languages: codes of the texts' languages.
        source: what was scored: a Hub id or a description.
        message: of the commit.
        token: by default `HF_TOKEN` or the stored one.
        shard_bytes: of a parquet file, about.
        keep_image_bytes: embed each image's file as it is, once it was searched; by default it loses its metadata
            (EXIF, GPS, comments, what stands behind its end), a JPEG without being compressed again, others as PNG.

    Returns:
        Where it is, `None` after a dry run.

    Raises:
        ValueError: the folder is no scored data set, the checks found something, or the Hub refused.
    """
    folder = Path(folder)
    check_repo_id(repo_id)
    alignment = _read_alignment(folder)
    splits = _load_splits(folder)
    findings = [finding for name, rows in splits.items() for finding in _check_rows(name, rows)]
    findings += [finding for name, rows in splits.items() for finding in _check_images(name, rows, keep_image_bytes)]
    with tempfile.TemporaryDirectory(prefix="aligngpt-publish-") as stage:
        files = _stage_files(Path(stage), folder, alignment, splits)
        infos = _describe_splits(splits)
        # rows that failed a check are not shown, and nothing is sent then
        samples = [] if findings else draw_samples(splits, len(list_levels(alignment)), Path(stage))
        files |= {pair["image"]: Path(stage) / pair["image"] for level in samples for pair in level["pairs"]}
        (Path(stage) / "README.md").write_text(
            _card(repo_id, splits, infos, alignment, HISTOGRAM in files, license, languages, source, tag, samples),
            encoding="utf-8",
        )
        files["README.md"] = Path(stage) / "README.md"
        findings += check_contents(files, folder)
        if findings:
            lines = "\n".join(f"  {finding}" for finding in findings)
            raise ValueError(f"{folder} is not fit to be published; nothing was sent:\n{lines}")
        total = sum(len(rows) for rows in splits.values())
        print(f"checked: {total:,} rows in {', '.join(splits)}; {len(files)} files beside them.")
        if dry_run:
            print(f"\nREADME.md:\n\n{files['README.md'].read_text(encoding='utf-8')}\ndry run: nothing was sent.")
            return None
        return upload_checked_folder(
            files,
            repo_id,
            "dataset",
            private=private,
            revision=revision,
            create_pr=create_pr,
            tag=tag,
            message=message or f"{total:,} scored pairs, {alignment.get('num_align_levels')} levels",
            stale=STALE,
            shards=_write_shards(splits, Path(stage), shard_bytes, keep_image_bytes),
            token=token,
        )


def _read_alignment(folder: Path) -> dict[str, Any]:
    path = folder / ALIGNMENT
    if not path.is_file():
        raise ValueError(f"{folder} holds no {ALIGNMENT}: give the output folder of `aligngpt score`.")
    try:
        alignment = read_record(path)
        if not list_levels(alignment):
            raise ValueError("edges and counts do not fit together")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no record of levels ({error}): score the data again.") from error
    return alignment


def _load_splits(folder: Path) -> dict[str, Dataset]:
    """The data set's splits, images given by path as images; one without a name is "train"."""
    try:
        loaded = load_from_disk(str(folder))
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{folder} is no data set ({error}): give the output folder of `aligngpt score`.") from error
    splits = dict(loaded) if isinstance(loaded, DatasetDict) else {"train": loaded}
    for name, rows in splits.items():
        missing = {"images", "messages", "clip_score", "align_level"} - set(rows.column_names)
        if missing:
            raise ValueError(f"{folder}, split {name}: the columns {', '.join(sorted(missing))} are missing.")
        if rows.features["images"] != List(Image()) and rows.features["images"] != List(Image(decode=False)):
            # images left in their files by `embed_images: false`
            rows = rows.cast_column("images", List(Image()))
        splits[name] = rows.with_format(None)
    return splits


def _check_rows(split: str, rows: Dataset) -> list[str]:
    """Secrets and paths in every text at any depth, apart from the images; names of columns and classes, too."""
    findings = [f"split {split}, columns: {finding}" for finding in find_secrets(str(rows.features))]
    columns = rows.remove_columns("images").with_format("arrow")
    for batch in tqdm(columns.iter(ROWS_AT_ONCE), total=-(-len(rows) // ROWS_AT_ONCE), desc=f"{split}: texts read"):
        for name in batch.column_names:
            text = "\n".join(strings_in(batch[name].to_pylist()))
            for finding in [*find_secrets(text), *find_paths(text)]:
                # the line is the batch's, which helps nobody
                findings.append(f"split {split}, column {name}: holds {finding.partition(' holds ')[2]}")
        if len(findings) >= MOST_FINDINGS:
            return [*findings[:MOST_FINDINGS], f"split {split}: the rows behind were not looked at any more"]
    return findings


def _check_images(split: str, rows: Dataset, keep_bytes: bool) -> list[str]:
    """Rows whose image is no image, by its header; and secrets in bytes that are kept. No address is asked for."""
    others = [name for name, kind in rows.features.items() if name != "images" and _holds_files(kind)]
    if others:
        return [f"split {split}: the columns {', '.join(others)} hold files; only `images` may. Take them out."]
    stored = rows.select_columns(["images"]).cast_column("images", List(Image(decode=False)))
    findings = []
    for number, row in enumerate(tqdm(stored, desc=f"{split}: images looked at")):
        for value in row["images"]:
            try:
                image_size(value)
                found = _find_in_image(_bytes(value)) if keep_bytes else []
            except Exception as error:
                named = value.get("path") or f"{len(value['bytes'] or b'')} bytes"
                found = [f"{shortened(named)} is no image ({error}). Leave it out."]
            findings += [f"split {split}, row {number}: {finding}" for finding in found]
        if len(findings) >= MOST_FINDINGS:
            break
    return findings


def _find_in_image(data: bytes) -> list[str]:
    """What an image must not say, in its bytes and beside its pixels."""
    text = texts_of_image(data)
    place = ["the image says where it was taken (GPS); leave --keep-image-bytes out."] if has_place(data) else []
    tokens = [f"the image {finding}" for finding in find_tokens(io.BytesIO(data))]
    return [*tokens, *(f"the image: {finding}" for finding in [*find_secrets(text), *find_paths(text)]), *place]


def _bytes(value: dict[str, Any]) -> bytes:
    return value["bytes"] if value.get("bytes") is not None else Path(value["path"]).read_bytes()


def _holds_files(feature: Any) -> bool:
    if isinstance(feature, dict):
        return any(map(_holds_files, feature.values()))
    if hasattr(feature, "feature"):
        return _holds_files(feature.feature)
    return hasattr(feature, "embed_storage")


def _stage_files(stage: Path, folder: Path, alignment: dict[str, Any], splits: dict[str, Dataset]) -> dict[str, Path]:
    """What goes beside the rows and the card: the levels' record and the histogram."""
    (stage / ALIGNMENT).write_text(json.dumps(alignment, indent=2) + "\n", encoding="utf-8")
    files = {ALIGNMENT: stage / ALIGNMENT}
    if (folder / HISTOGRAM).is_file():
        files |= stage_files({HISTOGRAM: folder / HISTOGRAM}, stage)
    else:
        scores = [score for rows in splits.values() for score in rows["clip_score"][:]]
        draw_histogram(scores, alignment["edges"], stage / HISTOGRAM)
        files[HISTOGRAM] = stage / HISTOGRAM
    return files


def _num_shards(rows: Dataset, shard_bytes: int) -> int:
    """By the bytes of the tables, and of image files beside them as the first 1,000 rows have them."""
    own = rows.data.nbytes * len(rows) / max(1, len(rows.data))
    sample = rows.select_columns(["images"]).cast_column("images", List(Image(decode=False)))[:1000]["images"]
    outside = [value["path"] for images in sample for value in images or () if value["bytes"] is None]
    files = sum(Path(path).stat().st_size for path in outside) * len(rows) / max(1, len(sample))
    return max(1, min(len(rows), math.ceil((own + files) / shard_bytes)))


def _write_shards(
    splits: dict[str, Dataset], stage: Path, shard_bytes: int, keep_bytes: bool
) -> Iterator[tuple[str, Path]]:
    """Parquet files with the images inside; each is removed when the next is asked for."""
    plan = [(name, rows, _num_shards(rows, shard_bytes)) for name, rows in splits.items()]
    with tqdm(total=sum(len(rows) for _, rows, _ in plan), desc="rows sent", unit="row") as bar:
        for name, rows, count in plan:
            for index in range(count):
                shard = rows.shard(count, index, contiguous=True)
                path = stage / f"{name}-{index:05d}-of-{count:05d}.parquet"
                _write_parquet(shard, path, keep_bytes)
                yield f"data/{path.name}", path
                path.unlink()
                bar.update(len(shard))


def _write_parquet(rows: Dataset, path: Path, keep_bytes: bool) -> None:
    """Rows with their images inside, without bars of their own. What does not decode as an image is not read in."""
    beside, shown = Path(f"{path}.arrow"), not are_progress_bars_disabled()
    stored = rows.cast_column("images", List(Image(decode=False)))

    def embed(batch: dict[str, list]) -> dict[str, list]:
        return {"images": [[_embedded(value, keep_bytes) for value in images] for images in batch["images"]]}

    disable_progress_bars()
    try:
        whole = stored.map(embed, batched=True, batch_size=100, cache_file_name=str(beside), features=stored.features)
        whole.cast_column("images", List(Image())).to_parquet(path)
    finally:
        if shown:
            enable_progress_bars()
    beside.unlink()


def _embedded(value: dict[str, Any], keep_bytes: bool) -> dict[str, Any]:
    """
    An image's bytes under a name made of them, as a file's own name may say who or what, once it was decoded whole.

    Raises:
        ValueError: a token stands in the bytes.
    """
    read_image(value)
    data = _bytes(value)
    if not keep_bytes:
        data = without_metadata(data)
        if found := find_tokens(io.BytesIO(data)):
            raise ValueError(f"An image {found[0]} {shortened(value.get('path'))}: nothing was committed.")
    suffix = {b"\xff\xd8": ".jpg", b"\x89P": ".png"}.get(data[:2], "")
    return {"bytes": data, "path": hashlib.sha256(data).hexdigest()[:16] + suffix}


def _describe_splits(splits: dict[str, Dataset]) -> DatasetInfosDict:
    """What `load_dataset` wants to know: features and sizes."""
    features = next(iter(splits.values())).features
    for name, rows in splits.items():
        if rows.features != features:
            raise ValueError(f"split {name} has other columns than the first.")
    info = DatasetInfo(features=Features(features))
    return DatasetInfosDict({"default": info})


# ---- the card ----


def _card(
    repo_id: str,
    splits: dict[str, Dataset],
    infos: DatasetInfosDict,
    alignment: dict[str, Any],
    has_histogram: bool,
    license: str | None,
    languages: Sequence[str],
    source: str | None,
    tag: str | None,
    samples: list[dict[str, Any]],
) -> str:
    total = sum(len(rows) for rows in splits.values())
    data = DatasetCardData(
        language=list(languages),
        license=license,
        task_categories=["image-text-to-text"],
        size_categories=[_size_category(total)],
        source_datasets=[source] if is_hub_id(source) else None,
        pretty_name=repo_id.split("/")[-1],
        tags=list(TAGS),
    )
    data_files = [{"split": name, "path": f"data/{name}-*"} for name in splits]
    MetadataConfigs({"default": {"data_files": data_files}}).to_dataset_card_data(data)
    infos.to_dataset_card_data(data)
    rows = alignment.get("rows") or {}
    features = next(iter(splits.values())).features
    values = {
        "title": repo_id.split("/")[-1],
        "paper": PAPER,
        "repo_id": repo_id,
        "revision": tag or "main",
        "pin_hint": "" if tag else "  # or a tag, or a commit",
        "split": next(iter(splits)),
        "columns": [(name, COLUMNS.get(name, _kind(kind))) for name, kind in features.items()],
        "splits": [(name, f"{len(rows):,}") for name, rows in splits.items()],
        "levels": list_levels(alignment),
        "levels_text": levels_text(alignment, with_rows=False),
        "has_histogram": has_histogram,
        "samples": samples,
        "scorer": _scorer(alignment),
        "rows": [(name.replace("_", " "), f"{count:,}") for name, count in rows.items() if isinstance(count, int)],
        "rows_text": describe_rows(rows),
        "source": hub_link(source, dataset=True) if is_hub_id(source) else source or "their source",
        "licence_text": f"Published under `{license}`." if license else "",
    }
    return str(DatasetCard.from_template(data, template_path=str(TEMPLATE), **values)).rstrip() + "\n"


def _kind(feature: Any) -> str:
    return f"{feature.dtype}" if hasattr(feature, "dtype") else "as in the source"


def _scorer(alignment: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [("model", hub_link(alignment.get("scorer")))]
    if alignment.get("revision"):
        facts.append(("revision", f"`{alignment['revision']}`"))
    if alignment.get("sha256"):
        facts.append(("SHA-256 of its files", f"`{alignment['sha256']}`"))
    details = {**alignment, **(alignment.get("preprocessing") or {})}
    for name in ("architecture", "dtype", "image_processor", "max_text_tokens", "min_score"):
        if details.get(name) is not None:
            facts.append((name.replace("_", " "), str(details[name])))
    if sampling := alignment.get("sampling"):
        facts.append(("sampling", f"{sampling.get('method')}, at most {sampling.get('samples_per_level')} a level"))
    return facts


def _size_category(count: int) -> str:
    names = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
    place = next((place for place in range(len(names)) if count < 10 ** (place + 3)), len(names))
    if place == 0:
        return f"n<{names[0]}"
    return f"{names[place - 1]}<n<{names[place]}" if place < len(names) else f"n>{names[-1]}"


# ---- the command ----


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `aligngpt publish-data`."""
    parser.add_argument("folder", metavar="DIR", help="the output folder of `aligngpt score`")
    add_hub_arguments(parser)
    parser.add_argument("--license", metavar="NAME", help="the data's licence, by the Hub's name for it")
    parser.add_argument("--language", action="append", metavar="CODE", help="of the texts, default: en")
    parser.add_argument("--source", metavar="ID", help="what was scored: a Hub id or a description")
    parser.add_argument(
        "--keep-image-bytes",
        action="store_true",
        help="embed image files as they are, after a search for secrets and GPS (default: without their metadata)",
    )


def run(args: argparse.Namespace) -> int:
    """Run `aligngpt publish-data`; the exit code."""
    upload = publish_dataset(
        args.folder,
        args.repo_id,
        source=args.source,
        keep_image_bytes=args.keep_image_bytes,
        **hub_settings(args),
    )
    if upload is not None:
        print(describe(upload))
    return 0
