"""`evaluation_results.json`: what was measured, how, and the paper's figures beside it."""

import math
import os
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from aligngpt_shared.files import write_json
from aligngpt_shared.records import EVALUATION, read_record, versioned

from .tasks import BENCHMARKS, BY_NAME, Benchmark


class Results:
    """
    The results file of a folder.

    Args:
        folder: where it is, or will be.
        identity: model, revision, weights, dtype, level and mode that the figures are of.
        seed: of the run.
        overwrite: start anew where the file holds figures of something else.

    Raises:
        ValueError: the file holds figures of something else, or cannot be read.
    """

    def __init__(self, folder: str | os.PathLike, identity: dict[str, Any], seed: int, overwrite: bool = False):
        self.path = Path(folder) / EVALUATION
        self.content: dict[str, Any] = {
            **versioned(identity),
            "code_version": code_version(),
            "seed": seed,
            "results": [],
        }
        self.content |= {"details": {}, "runs": {}}
        if self.path.is_file() and not overwrite:
            try:
                before = read_record(self.path)
                changed = [name for name in identity if before.get(name) != identity[name]]
            except (ValueError, AttributeError) as error:
                raise ValueError(f"{self.path} cannot be read ({error}): move it away, or --overwrite.") from error
            if changed:
                shown = ", ".join(f"{name} {before.get(name)!r}" for name in changed)
                raise ValueError(
                    f"{self.path} holds figures with {shown}: give another --output, or --overwrite to start anew."
                )
            self.content |= {name: before[name] for name in ("results", "details", "runs") if name in before}

    def is_done(self, benchmark: Benchmark, settings: dict[str, Any]) -> bool:
        """
        Whether the figures are there; a judge and more samples come on top.

        Raises:
            ValueError: they are there of more samples, or by another judge.
        """
        before = self.content["runs"].get(benchmark.task, {}).get("settings")
        if before is None or before == settings:
            return before is not None
        fewer = (settings["limit"] or math.inf) < (before["limit"] or math.inf)
        if not fewer and before["judge"] in (None, settings["judge"]):
            return False
        shown = ", ".join(f"{name} {before[name]!r}" for name in settings if before[name] != settings[name])
        raise ValueError(
            f"{self.path} holds {benchmark.task} with {shown}: give another --output, or --overwrite to start anew."
        )

    def add(
        self,
        benchmark: Benchmark,
        figures: list[tuple[str, float]],
        *,
        samples: Sequence,
        dataset: str,
        split: str,
        task_version: str,
        settings: dict[str, Any],
        seconds: float,
    ):
        """
        Puts a benchmark's figures in and writes the file: the first is the paper's; those of parts of the benchmark
        (`part/metric`) become its `details`.
        """
        rows = [row for row in self.content["results"] if row["task"] != benchmark.task]
        self.content["details"][benchmark.task] = {name: round(value, 4) for name, value in figures if "/" in name}
        whole = [(name, value) for name, value in figures if "/" not in name]
        for index, (metric, value) in enumerate(whole):
            rows.append(
                {
                    "task": benchmark.task,
                    "task_version": task_version,
                    "dataset": dataset,
                    "split": split,
                    "metric": metric,
                    "value": round(value, 4),
                    "num_samples": len(samples),
                    "paper_7b": benchmark.paper_7b if index == 0 else None,
                    "paper_13b": benchmark.paper_13b if index == 0 else None,
                    **({"note": benchmark.note} if benchmark.note and index == 0 else {}),
                }
            )
        order = {known.task: place for place, known in enumerate(BENCHMARKS)}
        self.content["results"] = sorted(rows, key=lambda row: order[row["task"]])
        self.content["runs"][benchmark.task] = {"settings": settings, "seconds": round(seconds, 3)}
        self.content["date"] = datetime.now(UTC).isoformat(timespec="seconds")
        self.write()

    def write(self):
        write_json(self.path, self.content)

    def describe(self) -> str:
        """The paper's figure of each benchmark, ours beside it."""
        lines = [f"{'benchmark':<15}{'metric':<18}{'value':>9}{'number':>9}{'paper 7B':>10}{'13B':>9}"]
        shown, notes = set(), []
        for row in self.content["results"]:
            if row["task"] in shown:
                continue
            shown.add(row["task"])
            paper = [f"{value:.1f}" if value is not None else "-" for value in (row["paper_7b"], row["paper_13b"])]
            title = BY_NAME[row["task"]].title
            lines.append(
                f"{title:<15}{row['metric']:<18}{row['value']:>9.1f}{row['num_samples']:>9}{paper[0]:>10}{paper[1]:>9}"
            )
            if row.get("note"):
                notes.append(f"{title}: {row['note']}")
        return "\n".join([*lines, *notes])


def code_version() -> str:
    """Version of the package, with the commit where the code lies in a checkout."""
    try:
        number = version("aligngpt")
    except PackageNotFoundError:
        number = "unknown"
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return number
    done = subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return f"{number}+{done.stdout.strip()}" if done.returncode == 0 else number
