"""
The tables of benchmarks/ablation.md, made of the runs that lie in benchmarks/ablation/.

    python benchmarks/ablation_page.py --gather runs/ablation --runs 3200   # a folder's finished runs, added to those
    python benchmarks/ablation_page.py                                      # the page's tables, written anew

A table stands between `<!-- runs 3200 clean: names of variants; ... -->` and `<!-- end of runs -->`; the first name is
what the others are compared with.
"""

import argparse
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from aligngpt_playground.ablation.table import describe, summarize
from aligngpt_playground.ablation.variants import VARIANTS
from aligngpt_shared.files import write_file


HERE = Path(__file__).parent
PAGE, RUNS = HERE / "ablation.md", HERE / "ablation"
BLOCK = re.compile(r"<!-- runs (?P<file>\w+) (?P<data>\w+): (?P<names>[^>]+?)\s-->\n.*?<!-- end of runs -->", re.DOTALL)
DIGITS = 6
ORDER = [variant.name for variant in VARIANTS]


def read(path: Path) -> list[dict[str, Any]]:
    """The runs of a file, one JSON a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def gather(folder: Path, path: Path) -> int:
    """Adds the finished runs of an ablation's folder to a file, in place of those it has of them; returns how many."""
    found = [json.loads(run.read_text(encoding="utf-8")) for run in folder.glob("seed-*/runs/*.json")]
    runs = {(run["variant"], run["seed"]): run for run in [*read(path), *map(_short, found)]}
    ordered = sorted(runs.values(), key=lambda run: (ORDER.index(run["variant"]), run["seed"]))
    write_file(path, "".join(json.dumps(run) + "\n" for run in ordered))
    return len(found)


def _short(value: Any) -> Any:
    """The same with floats of six digits."""
    if isinstance(value, dict):
        return {name: _short(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_short(each) for each in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def table(file: str, data: str, names: list[str]) -> str:
    """Means and paired differences of these variants.

    Raises:
        ValueError: a variant is unknown, or has no runs.
    """
    by_name = {variant.name: asdict(variant) for variant in VARIANTS if variant.data == data}
    runs = [run for run in read(RUNS / f"{file}.jsonl") if run["variant"] in names]
    if lacking := [name for name in names if name not in by_name or all(run["variant"] != name for run in runs)]:
        raise ValueError(f"{file}.jsonl has no {data} runs of {lacking[0]!r}")
    return describe(summarize(runs, [by_name[name] for name in names], data))


def written(page: str) -> str:
    """The page with its tables made anew."""

    def made(found: re.Match) -> str:
        # a name may be continued on the next line
        names = [" ".join(name.split()) for name in found["names"].split(";")]
        head = found[0].split("-->\n")[0]
        return f"{head}-->\n\n{table(found['file'], found['data'], names)}\n\n<!-- end of runs -->"

    return BLOCK.sub(made, page)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gather", type=Path, help="folder of `python -m aligngpt_playground ablation`")
    parser.add_argument("--runs", help="with --gather: file in benchmarks/ablation/ without .jsonl")
    args = parser.parse_args(arguments)
    if (args.gather is None) != (args.runs is None):
        parser.error("--gather and --runs belong together")
    if args.gather is not None:
        path = RUNS / f"{args.runs}.jsonl"
        print(f"{gather(args.gather, path)} runs of {args.gather}, {len(read(path))} in {path.name}")
    write_file(PAGE, written(PAGE.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
