"""`evaluate` module of LLaVA-Bench (in the wild); the rule stands in `scoring.py`."""

import datasets
import evaluate

from .scoring import llava_bench_scores


_DESCRIPTION = """Points that a judge gives the model, in percent of those it gives the reference answers."""
_ARGUMENTS = """
Args:
    predictions: stored judgements, whose first line holds two scores (reference, model).
    references: category of each question: conv, detail or complex.
"""
_CITATION = """Liu et al., Visual Instruction Tuning, NeurIPS 2023 (arXiv 2304.08485)."""


class LLaVABench(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_ARGUMENTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Value("string"),
                }
            ),
        )

    def _compute(self, predictions, references):
        return llava_bench_scores(predictions, references)
