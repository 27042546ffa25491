"""The tables of benchmarks/ablation.md say what the runs beside it say."""

import json
import sys
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def page():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import ablation_page
    finally:
        sys.path.remove(str(BENCHMARKS))
    return ablation_page


def test_tables_say_what_the_runs_say(page):
    text = page.PAGE.read_text()
    assert page.written(text) == text, "python benchmarks/ablation_page.py writes them anew"
    blocks = list(page.BLOCK.finditer(text))
    assert {block["file"] for block in blocks} == {path.stem for path in page.RUNS.glob("*.jsonl")}
    # every run is in a table
    shown = {(block["file"], " ".join(name.split())) for block in blocks for name in block["names"].split(";")}
    there = {(path.stem, run["variant"]) for path in page.RUNS.glob("*.jsonl") for run in page.read(path)}
    assert shown == there


def test_runs_are_gathered_and_tables_made(page, tmp_path, monkeypatch, capsys):
    def write(seed, name, answers):
        path = tmp_path / "runs" / f"seed-{seed}" / "runs" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        run = {"variant": name, "seed": seed, "questions": {"overall": answers}, "gate": [], "seconds": 1.0}
        path.write_text(json.dumps(run))

    monkeypatch.setattr(page, "RUNS", tmp_path)
    monkeypatch.setattr(page, "PAGE", tmp_path / "page.md")
    page.PAGE.write_text(
        "a\n<!-- runs new clean: no alignment;\nlocal only\n-->\nold\n<!-- end of runs -->\n<!-- runs new clean: "
        "local only -->\n<!-- end of runs -->\nb\n"
    )
    for seed, value in enumerate((0.12345678, 0.5)):
        write(seed, "local only", value)
        write(seed, "no alignment", 0.25)
    page.main(["--gather", str(tmp_path / "runs"), "--runs", "new"])
    assert "4 runs of" in capsys.readouterr().out
    assert [run["questions"]["overall"] for run in page.read(tmp_path / "new.jsonl")] == [0.25, 0.25, 0.123457, 0.5]
    text = page.PAGE.read_text()
    assert "\nold" not in text
    assert text.startswith("a\n<!-- runs new clean: no alignment;\nlocal only\n-->\n\n| variant")
    assert text.count("| local only | 2 | 0.312 ± 0.266 |") == 2 and text.endswith("<!-- end of runs -->\nb\n")
    # a run that was made again takes the place of the old one
    write(0, "local only", 0.5)
    page.main(["--gather", str(tmp_path / "runs"), "--runs", "new"])
    assert len(page.read(tmp_path / "new.jsonl")) == 4 and "| local only | 2 | 0.500 ± 0.000 |" in page.PAGE.read_text()
    with pytest.raises(ValueError, match=r"new.jsonl has no clean runs of 'mean of all levels'"):
        page.table("new", "clean", ["local only", "mean of all levels"])
    with pytest.raises(SystemExit):
        page.main(["--runs", "new"])
