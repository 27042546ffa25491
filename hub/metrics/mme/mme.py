"""`evaluate` module of MME; the rule stands in `scoring.py`."""

import datasets
import evaluate

from .scoring import mme_scores


_DESCRIPTION = (
    """Points for perception and cognition: accuracy and accuracy+ (both questions about an image) of each task."""
)
_ARGUMENTS = """
Args:
    predictions: answers.
    references: yes or no.
    question_ids: the image of each question.
    categories: the task of each question.
"""
_CITATION = """Fu et al., MME, arXiv 2306.13394."""


class MME(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_ARGUMENTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Value("string"),
                    "question_ids": datasets.Value("string"),
                    "categories": datasets.Value("string"),
                }
            ),
        )

    def _compute(self, predictions, references, question_ids, categories):
        return mme_scores(predictions, references, question_ids, categories)
