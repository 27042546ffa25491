"""`evaluate` module of MM-Vet; the rule stands in `scoring.py`."""

import datasets
import evaluate

from .scoring import mm_vet_scores


_DESCRIPTION = """Mean grade from a judge in percent, over all questions and for each capability."""
_ARGUMENTS = """
Args:
    predictions: stored judgements, each beginning with a grade from 0.0 to 1.0.
    references: capabilities that each question needs, with commas between them.
"""
_CITATION = """Yu et al., MM-Vet, ICML 2024 (arXiv 2308.02490)."""


class MMVet(evaluate.Metric):
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
        return mm_vet_scores(predictions, references)
