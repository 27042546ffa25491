"""`evaluate` module of POPE; the rule stands in `scoring.py`."""

import datasets
import evaluate

from .scoring import pope_scores


_DESCRIPTION = """Accuracy, precision, recall, F1 and share of yes, over all questions and for each split."""
_ARGUMENTS = """
Args:
    predictions: answers.
    references: yes or no.
    splits: random, popular or adversarial.
"""
_CITATION = (
    """Li et al., Evaluating Object Hallucination in Large Vision-Language Models, EMNLP 2023 (arXiv 2305.10355)."""
)


class POPE(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_ARGUMENTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Value("string"),
                    "splits": datasets.Value("string"),
                }
            ),
        )

    def _compute(self, predictions, references, splits):
        return pope_scores(predictions, references, splits)
