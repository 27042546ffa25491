"""Evaluation results as the card's table, as `model-index`, and as `.eval_results`."""

import math
from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry

from aligngpt_shared.references import is_hub_id

from .run_records import hub_link


def _rows_of(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Results with a finite number."""
    return [
        row
        for row in evaluation.get("results") or []
        if isinstance(row.get("value"), (int, float)) and math.isfinite(row["value"])
    ]


def results_table(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    rows = _rows_of(evaluation)
    shown = [
        {
            "task": row.get("task", "?"),
            "dataset": hub_link(row["dataset"], row.get("dataset_revision"), True) if row.get("dataset") else "-",
            "split": row.get("split") or "-",
            "metric": row.get("metric", "?"),
            "value": _show_result(row["value"]),
            "samples": f"{row['num_samples']:,}" if row.get("num_samples") else "-",
            "paper_7b": _show_result(row.get("paper_7b")),
            "paper_13b": _show_result(row.get("paper_13b")),
        }
        for row in rows
    ]
    facts = [("on", evaluation.get("date")), ("seed", evaluation.get("seed"))]
    facts += [("code", evaluation.get("code_version")), ("of revision", evaluation.get("revision"))]
    said = ", ".join(f"{name} {value}" for name, value in facts if value is not None)
    text = f"Measured {said}." if rows and said else ""
    with_paper = any(row.get("paper_7b") is not None or row.get("paper_13b") is not None for row in rows)
    return {"results": shown, "results_text": text, "with_paper": with_paper}


def _show_result(value: float | None) -> str:
    """One decimal, as papers have it; more for fractions of one."""
    return "-" if value is None else f"{value:.1f}" if abs(value) > 1 else f"{value:.4f}"


def model_index(evaluation: Mapping[str, Any]) -> list[EvalResult]:
    """For `model-index`."""
    return [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=row.get("dataset") or row.get("task", "unknown"),
            dataset_name=row.get("task") or row.get("dataset", "unknown"),
            dataset_split=row.get("split"),
            dataset_revision=row.get("dataset_revision"),
            metric_type=row.get("metric", "accuracy"),
            metric_name=row.get("metric"),
            metric_value=row["value"],
        )
        for row in _rows_of(evaluation)
    ]


def result_files(evaluation: Mapping[str, Any]) -> dict[str, list[EvalResultEntry]]:
    """For `.eval_results`: a file for each task whose data set is on the Hub."""
    files: dict[str, list[EvalResultEntry]] = {}
    for row in _rows_of(evaluation):
        if not is_hub_id(row.get("dataset")):
            continue
        task = str(row.get("task", "default"))
        notes = [str(row["metric"])] if row.get("metric") else []
        notes += [f"{row['num_samples']} samples"] if row.get("num_samples") else []
        notes += [f"task version {row['task_version']}"] if row.get("task_version") is not None else []
        entry = EvalResultEntry(
            dataset_id=row["dataset"],
            task_id=task,
            value=row["value"],
            dataset_revision=row.get("dataset_revision"),
            date=evaluation.get("date"),
            notes=", ".join(notes) or None,
        )
        name = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in task)
        files.setdefault(name, []).append(entry)
    return files
