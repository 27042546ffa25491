"""`evaluate` module of ScienceQA accuracy; the rule stands in `scoring.py`."""

import datasets
import evaluate

from .scoring import scienceqa_accuracy


_DESCRIPTION = """Share of answers that name the letter of the right choice."""
_ARGUMENTS = """
Args:
    predictions: answers.
    references: letters of the right choices.
"""
_CITATION = """Lu et al., Learn to Explain, NeurIPS 2022 (arXiv 2209.09513)."""


class ScienceQAAccuracy(evaluate.Metric):
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
        return scienceqa_accuracy(predictions, references)
