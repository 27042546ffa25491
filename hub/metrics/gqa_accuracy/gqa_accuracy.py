"""`evaluate` module of GQA accuracy; the rule stands in `scoring.py`."""

import datasets
import evaluate

from .scoring import gqa_accuracy


_DESCRIPTION = """Share of answers that are the reference, up to case and punctuation."""
_ARGUMENTS = """
Args:
    predictions: answers.
    references: the right answers.
"""
_CITATION = """Hudson and Manning, GQA, CVPR 2019 (arXiv 1902.09506)."""


class GQAAccuracy(evaluate.Metric):
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
        return gqa_accuracy(predictions, references)
