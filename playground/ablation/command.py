"""The paper's ablation table on the small world, with seeds and beside baselines of equal budget.

    python -m aligngpt_playground ablation --seeds 5 --output runs/ablation

Each seed draws its own world (pairs, conversations), its own initial projector, gate and level table, and its own order
of the rows; the held-out images are the same for all. Within a seed the variants share all of that, so that they can
be compared pair by pair. Variants whose stage 1 is the same share its model. A finished run is a JSON file: a stopped
command goes on where it was.
"""

import argparse
import concurrent.futures
import json
import math
import multiprocessing
import os
import sys
import time
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from aligngpt_shared.files import write_json

from .seed import run_seed
from .table import MEASURES, TABLE_NAME, describe, summarize
from .variants import PRETRAINS, VARIANTS, Settings, Variant, run_path


SETTINGS_NAME = "settings.json"
_DEFAULTS = {field.name: field.default for field in fields(Settings) if field.default is not MISSING}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m aligngpt_playground ablation`."""
    parser.add_argument("--output", type=Path, default=Path("runs/ablation"), help="folder to write (%(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="seeds, from 0 on (%(default)s)")
    parser.add_argument("--pairs", type=int, default=3200, help="image-caption pairs of stage 1 (%(default)s)")
    parser.add_argument("--pretrain-steps", type=int, default=300, help="steps of stage 1, 32 rows each (%(default)s)")
    parser.add_argument("--conversations", type=int, default=1920, help="conversations of stage 2 (%(default)s)")
    parser.add_argument("--heldout", type=int, default=320, help="held-out images of either kind (%(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="seeds worked on at once, a process each (%(default)s)")
    parser.add_argument("--variants", help="only these, with semicolons between their names (default: all)")
    parser.add_argument("--parts", type=Path, help="folder with clip/ and llama/ to use instead of the package's own")
    for name in ("batch_size", "pretrain_learning_rate", "instruct_learning_rate", "image_token_penalty"):
        value = _DEFAULTS[name]
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help="%(default)s")
    parser.add_argument("--instruct-batch-size", type=int, default=0, help="rows of a step of stage 2; 0: --batch-size")
    parser.add_argument("--instruct-epochs", type=int, default=1, help="passes of stage 2 over its rows (%(default)s)")
    parser.add_argument("--lora-r", type=int, default=0, help="rank of LoRA adapters in stage 2; 0: train all of it")
    parser.add_argument("--bf16", action="store_true", help="products in bfloat16")
    parser.add_argument("--keep-models", action="store_true", help="keep the models of stage 1 of finished seeds")


def run(args: argparse.Namespace) -> int:
    """Run what is missing and print the table; returns the exit status."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    counts = ("seeds", "pairs", "pretrain_steps", "conversations", "heldout", "jobs", "batch_size", "instruct_epochs")
    for name in counts:
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    for name in (
        "pretrain_learning_rate",
        "instruct_learning_rate",
        "image_token_penalty",
        "lora_r",
        "instruct_batch_size",
    ):
        if not 0 <= getattr(args, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be 0 or more")
    output = args.output.absolute()
    parts = args.parts.absolute() if args.parts else None
    options = {field.name: getattr(args, field.name) for field in fields(Settings) if hasattr(args, field.name)}
    settings = Settings(**{**options, "parts": parts.name if parts else "package"})
    variants = _select(args.variants)
    _open_output(output, settings)
    started = time.perf_counter()
    done = _run_seeds(range(args.seeds), variants, settings, output, parts, args.jobs, args.keep_models)
    runs = read_runs(output, args.seeds)
    tables = {data: _table(runs, data) for data in MEASURES}
    facts = {"settings": asdict(settings), "pretrains": {name: asdict(v) for name, v in PRETRAINS.items()}}
    write_json(output / TABLE_NAME, {"tables": tables, **facts})
    print("\n\n".join(describe(table) for table in tables.values() if table["rows"]))
    print(
        f"\n{done} runs done now, {len(runs)} altogether, {time.perf_counter() - started:.0f} s; {output / TABLE_NAME}"
    )
    return 0


def _table(runs: list[dict[str, Any]], data: str) -> dict[str, Any]:
    """The table of the variants of one kind of instruction data."""
    variants = [asdict(variant) for variant in VARIANTS if variant.data == data]
    names = {variant["name"] for variant in variants}
    return summarize([run for run in runs if run["variant"] in names], variants, data)


def _select(names: str | None) -> tuple[Variant, ...]:
    """The variants of these names."""
    if names is None:
        return VARIANTS
    known = {variant.name: variant for variant in VARIANTS}
    chosen = [name.strip() for name in names.split(";")]
    if unknown := [name for name in chosen if name not in known]:
        raise ValueError(f"--variants: there is no {unknown[0]!r}; there are {'; '.join(known)}")
    return tuple(known[name] for name in chosen)


def _open_output(output: Path, settings: Settings) -> None:
    """Make the folder, or check that it holds runs of the same settings."""
    path = output / SETTINGS_NAME
    if path.is_file():
        # a setting that was not there yet had its default
        before = {**_DEFAULTS, **json.loads(path.read_text(encoding="utf-8"))}
        changed = [name for name, value in asdict(settings).items() if before.get(name) != value]
        if changed:
            shown = ", ".join(f"{name} {before.get(name)}" for name in changed)
            raise ValueError(f"{output} holds runs with {shown}: use the same settings, or another --output")
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and holds no ablation: give another folder with --output")
    output.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(settings))


def read_runs(output: Path, seeds: int) -> list[dict[str, Any]]:
    """The finished runs of the first `seeds` seeds."""
    paths = [run_path(output, seed, variant) for seed in range(seeds) for variant in VARIANTS]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]


def _run_seeds(
    seeds: range,
    variants: tuple[Variant, ...],
    settings: Settings,
    output: Path,
    parts: Path | None,
    jobs: int,
    keep: bool,
) -> int:
    """Work through the seeds, `jobs` at a time; returns how many runs were made."""
    from tqdm.auto import tqdm

    paths = [run_path(output, seed, variant) for seed in seeds for variant in variants]
    before = sum(path.is_file() for path in paths)
    bar = tqdm(total=len(paths), initial=before, desc="runs", unit="run", file=sys.stdout)

    def advance() -> None:
        bar.update(sum(path.is_file() for path in paths) - bar.n)

    missing = [seed for seed in seeds if not all(run_path(output, seed, v).is_file() for v in variants)]
    arguments = [(seed, variants, settings, str(output), parts and str(parts), keep) for seed in missing]
    if jobs == 1:
        for each in arguments:
            run_seed(*each, after_run=advance)
    else:
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(min(jobs, len(arguments) or 1), context) as pool:
            pending = {pool.submit(run_seed, *each) for each in arguments}
            while pending:
                finished, pending = concurrent.futures.wait(
                    pending, timeout=5, return_when=concurrent.futures.FIRST_EXCEPTION
                )
                for future in finished:
                    future.result()
                advance()
    bar.close()
    return sum(path.is_file() for path in paths) - before
