"""
Scores of the paper's twelve benchmarks. Each folder is a module for `evaluate.load(FOLDER)` and for publishing: pure
functions in `scoring.py`, and around them a thin `evaluate.Metric`. Nothing here imports anything of ours, and the
functions need nothing but Python.
"""

from collections.abc import Callable, Sequence
from typing import Any

from .gqa_accuracy.scoring import gqa_accuracy
from .llava_bench.scoring import llava_bench_scores, parse_pair
from .mm_vet.scoring import mm_vet_scores, parse_grade
from .mmbench.scoring import mmbench_scores, read_choice
from .mme.scoring import mme_scores
from .pope.scoring import pope_scores
from .scienceqa_accuracy.scoring import scienceqa_accuracy
from .seed_bench.scoring import seed_bench_scores
from .vqa_accuracy.scoring import vqa_accuracy


METRICS = (
    "gqa_accuracy",
    "llava_bench",
    "mm_vet",
    "mmbench",
    "mme",
    "pope",
    "scienceqa_accuracy",
    "seed_bench",
    "vqa_accuracy",
)
"""Names of the folders."""


def on_records(metric: Callable[..., dict[str, Any]], **options: Any) -> Callable[[Sequence[dict]], dict[str, float]]:
    """
    A metric of answers and references for training: `AlignGPTInstructTrainer(generation_metrics=on_records(...))`.

    Args:
        metric: such as `vqa_accuracy`, `gqa_accuracy`, `scienceqa_accuracy` or `pope_scores`.
        options: handed to it.

    Returns:
        A function of records with `answer` and `reference`, which gives the metric's numbers (no tables).
    """

    def compute(records: Sequence[dict[str, Any]]) -> dict[str, float]:
        found = metric([each["answer"] for each in records], [each["reference"] for each in records], **options)
        return {name: float(value) for name, value in found.items() if isinstance(value, (int, float))}

    return compute


__all__ = [
    "METRICS",
    "gqa_accuracy",
    "llava_bench_scores",
    "mm_vet_scores",
    "mmbench_scores",
    "mme_scores",
    "on_records",
    "parse_grade",
    "parse_pair",
    "pope_scores",
    "read_choice",
    "scienceqa_accuracy",
    "seed_bench_scores",
    "vqa_accuracy",
]
