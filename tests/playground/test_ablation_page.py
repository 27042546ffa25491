"""The tables of benchmarks/ablation.md whose runs lie beside it say what those runs say."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from aligngpt_playground.ablation.table import describe, summarize
from aligngpt_playground.ablation.variants import VARIANTS


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# section of the page -> file of its runs
SECTIONS = {"## Vector, number of levels, controls": "3200", "## SmolLM2-135M": "smollm2"}


def rows_of(text: str) -> list[list[str]]:
    """Cells of all lines of tables."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def made(name: str) -> list[list[str]]:
    runs = [json.loads(line) for line in (BENCHMARKS / "ablation" / f"{name}.jsonl").read_text().splitlines()]
    found = []
    for data in ("clean", "noisy"):
        variants = [asdict(variant) for variant in VARIANTS if variant.data == data]
        names = {variant["name"] for variant in variants}
        if chosen := [run for run in runs if run["variant"] in names]:
            found += rows_of(describe(summarize(chosen, variants, data)))
    return found


@pytest.mark.parametrize("section", SECTIONS)
def test_tables_say_what_the_runs_say(section):
    page = (BENCHMARKS / "ablation.md").read_text()
    shown = rows_of(page.split(section)[1].split("\n## ")[0])
    expected = made(SECTIONS[section])
    assert len(shown) == len(expected) > 4
    for cells in shown:
        # a cell that is empty on the page belongs to a stage 1 that another row shows
        fits = [row for row in expected if len(row) == len(cells) and row[0] == cells[0]]
        fits = [
            row for row in fits if all(not own or own == there for own, there in zip(cells[1:], row[1:], strict=True))
        ]
        assert len(fits) == 1, cells
