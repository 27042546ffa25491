"""The benchmark scripts run, small, and write what their pages are made of. Nothing is timed here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import run_scripts


# run by `make proofs`
pytestmark = pytest.mark.proof


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[dict[str, dict], str]:
    """JSON by script, and all that was printed."""
    output = tmp_path_factory.mktemp("figures")
    result = subprocess.run(
        [sys.executable, run_scripts.__file__, str(BENCHMARKS), str(output)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        cwd=output,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=1200,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    files = {name: json.loads((output / f"{name}.json").read_text()) for name in run_scripts.SCRIPTS}
    return files, result.stdout


@pytest.mark.parametrize("name", run_scripts.SCRIPTS)
def test_each_script_prints_a_table(name, written):
    files, printed = written
    of_script = printed.partition(f"## {name}\n")[2].partition("\n## ")[0]
    assert of_script.count("|---|") >= 1 and "nan" not in of_script
    if name != "scaling":
        machine = files[name]["machine"]
        assert {"cpu", "cores", "gpu", "torch", "command", "commit", "date"} <= machine.keys()


def test_overhead(written):
    works = written[0]["overhead"]["works"]
    assert len(works) == len(run_scripts.WORKS)
    for title, record in works.items():
        assert {"aligngpt", "llava"} <= record["seconds"].keys()
        assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in record["seconds"].values())
        # deterministic, and the point of the benchmark: no copy of what is held
        assert record["peak"]["aligngpt"] < 1.15 * record["peak"]["llava"], title


def test_loading(written):
    loads = written[0]["loading"]["loads"]
    assert loads.keys() == {"remote", "llava"}
    assert all(
        record["weights"] > 100_000 and record["seconds"] > 0 for records in loads.values() for record in records
    )


def test_decoding(written):
    record = written[0]["decoding"]["batches"]["2"]
    assert record["same_tokens"] and "AlignGPT, static cache, compiled" in record["compile_seconds"]


def test_batching(written):
    figures = written[0]["batching"]
    plain, drawn, grouped, packed, grouped_packed = figures["training"].values()
    assert grouped[0]["waste"] < drawn[0]["waste"] == pytest.approx(plain[0]["waste"], abs=0.05)
    # packing changes what is computed, not what is learned
    assert packed[0]["loss"] == pytest.approx(drawn[0]["loss"], rel=1e-3)
    assert grouped_packed[0]["loss"] == pytest.approx(grouped[0]["loss"], rel=1e-3)
    assert plain[0]["loss"] == pytest.approx(grouped[0]["loss"], rel=0.5)
    assert figures["answers"]["equal"] == figures["answers"]["prompts"] == 9


def test_seven_billion(written):
    figures = written[0]["seven_billion"]
    assert figures["works"].keys() == {"stage1", "stage2", "generate"}
    assert figures["utilisation"].keys() == {"TINY stage 1", "TINY stage 2"}
    for stage in ("stage1", "stage2"):
        work = figures["works"][stage]
        assert work["done_flops"] > work["needed_flops"] > 0
        assert all(values["peak"] > 0 for values in work["contenders"].values())


def test_scaling(written):
    figures = written[0]["scaling"]
    assert {plan["gpus"] for plan in figures["plans"]} == {8, 64, 512}
    assert len(figures["plans"]) == 12 and len(figures["scoring"]) == 18
