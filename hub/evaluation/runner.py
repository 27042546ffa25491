"""One benchmark after the other: lmms-eval asks, answers and judgements are kept, figures are written."""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .judge import JudgeServer, judge_samples
from .results import Results
from .scores import SUBMISSIONS
from .tasks import Benchmark, make_task


def run_benchmarks(
    lm: Any,
    benchmarks: Sequence[Benchmark],
    output: str | os.PathLike,
    *,
    limit: int | None = None,
    data: dict[str, str] | None = None,
    judge: JudgeServer | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> Results:
    """
    Run what is missing.

    Args:
        lm: an `AlignGPTLmms`.
        benchmarks: which.
        output: folder that gets `evaluation_results.json` and `evaluation/`: `answers-TASK.jsonl` (prompt, answer and
            share of each level, by sample), `judgements-TASK.jsonl`, `submission-TASK.json`.
        limit: only the first so many samples of each.
        data: local folders of data sets by task name.
        judge: scores the judged benchmarks; without it their answers are kept for later.
        seed: of everything random.
        overwrite: start anew.

    Returns:
        The results file.
    """
    kept = Path(output) / "evaluation"
    results = Results(output, lm.identity, seed, overwrite)
    to_judge: list[tuple[Benchmark, dict[str, Any]]] = []
    for benchmark in benchmarks:
        settings = {"limit": limit, "judge": judge.model if judge and benchmark.judge else None}
        if results.is_done(benchmark, settings):
            print(f"{benchmark.task}: done before")
            continue
        started = time.perf_counter()
        if overwrite and lm.rank == 0:
            for path in kept.glob(f"*-{benchmark.task}.json*"):
                path.unlink()
        lm.accelerator.wait_for_everyone()
        task = make_task(benchmark, (data or {}).get(benchmark.task))
        lm.keep_answers(kept / f"answers-{benchmark.task}.jsonl")
        found = run_task(lm, task, limit, seed, benchmark.score if isinstance(benchmark.score, dict) else {})
        if found is None:  # another process than the first
            continue
        lm.store.merge()
        found |= {"settings": settings, "seconds": time.perf_counter() - started}
        if make := SUBMISSIONS.get(benchmark.task):
            path = kept / f"submission-{benchmark.task}.json"
            path.write_text(json.dumps([make(sample) for sample in found["samples"]]), encoding="utf-8")
            print(f"{benchmark.task}: {len(found['samples'])} answers for the server in {path}")
        elif benchmark.judge:
            del found["metrics"]
            to_judge.append((benchmark, found))
        else:
            metrics = found.pop("metrics")
            figures = benchmark.score(found["samples"]) if callable(benchmark.score) else metrics
            results.add(benchmark, figures, **found)
    # at the end, because other processes would wait meanwhile
    for benchmark, found in to_judge:
        if judge:
            started = time.perf_counter()
            store = kept / f"judgements-{benchmark.task}.jsonl"
            judgements = judge_samples(found["samples"], benchmark.judge, judge, store)
            found["seconds"] += time.perf_counter() - started
            results.add(benchmark, benchmark.score(found["samples"], judgements), **found)
        elif benchmark.judge == "mmbench":  # its letters are read without a judge, but for a few
            results.add(benchmark, benchmark.score(found["samples"]), **found)
        else:
            print(
                f"{benchmark.task}: answered, not judged. Run again with --judge-url URL --judge-model NAME "
                "(an OpenAI-compatible server, such as `aligngpt serve`)."
            )
    return results


def run_task(
    lm: Any, task: Any, limit: int | None, seed: int, metrics: dict[str, tuple[str, float]]
) -> dict[str, Any] | None:
    """
    Answers of one task by lmms-eval, and those of its `metrics` that are asked for: our name and unit of each.

    Returns:
        `samples` (each `doc` without images, `answer`, `doc_id`) in the data set's order, `metrics`, and `dataset`,
        `split` and `task_version`; None in all processes but the first.
    """
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as folder:
        found = simple_evaluate(
            model=lm,
            tasks=[task],
            # the task is made already: no need to read the two thousand others
            task_manager=TaskManager(include_defaults=False),
            limit=limit,
            predict_only=not metrics,
            bootstrap_iters=0,
            process_docs_parallel=1,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            # images are not opened once more to log samples; TextVQA writes a file for a server, which is not wanted
            cli_args=argparse.Namespace(process_with_media=False, output_path=folder),
        )
    if found is None:
        return None
    name = task.EVAL_HARNESS_NAME
    logged = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    samples = [
        {"doc_id": sample["doc_id"], "doc": sample["doc"], "answer": _text(sample["filtered_resps"])}
        for sample in logged
    ]
    own = task.config.metadata
    own = own[0] if isinstance(own, list) and own else own or {}
    numbers = f"lmms-eval {version('lmms_eval')}" + (f", task {own['version']}" if "version" in own else "")
    dataset = str(task.config.dataset_path)
    values = found["results"][name]
    return {
        "samples": samples,
        "metrics": [(own_name, values[f"{theirs},none"] * unit) for theirs, (own_name, unit) in metrics.items()],
        "dataset": Path(dataset).name if Path(dataset).is_dir() else dataset,
        "split": str(task.config.test_split),
        "task_version": numbers,
    }


def _text(responses: Any) -> str:
    while isinstance(responses, list):
        responses = responses[0]
    return responses
