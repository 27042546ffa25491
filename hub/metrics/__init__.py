"""
Scores that lmms-eval does not give as the paper has them: pure functions that need nothing but Python. `vqa_accuracy`
is a module for `evaluate.load(FOLDER)`, too.
"""

from collections.abc import Callable, Sequence
from typing import Any

from .llava_bench import llava_bench_scores, parse_pair
from .mm_vet import mm_vet_scores, parse_grade
from .mmbench import mmbench_scores, read_choice
from .pope import pope_scores
from .vqa_accuracy.scoring import vqa_accuracy


def on_records(metric: Callable[..., dict[str, Any]], **options: Any) -> Callable[[Sequence[dict]], dict[str, float]]:
    """
    A metric of answers and references for training: `AlignGPTInstructTrainer(generation_metrics=on_records(...))`.

    Args:
        metric: such as `vqa_accuracy` or `pope_scores`.
        options: handed to it.

    Returns:
        A function of records with `answer` and `reference`, which gives the metric's numbers (no tables).
    """

    def compute(records: Sequence[dict[str, Any]]) -> dict[str, float]:
        found = metric([each["answer"] for each in records], [each["reference"] for each in records], **options)
        return {name: float(value) for name, value in found.items() if isinstance(value, (int, float))}

    return compute


__all__ = [
    "llava_bench_scores",
    "mm_vet_scores",
    "mmbench_scores",
    "on_records",
    "parse_grade",
    "parse_pair",
    "pope_scores",
    "read_choice",
    "vqa_accuracy",
]
