"""`evaluate` module of SEED-Bench; the rule stands in `scoring.py`."""

import datasets
import evaluate

from .scoring import seed_bench_scores


_DESCRIPTION = """Share of right choices, over all questions, for images and videos, and for each type of question."""
_ARGUMENTS = """
Args:
    predictions: answers.
    references: letters of the right choices.
    data_types: image or video.
    question_types: type of each question.
"""
_CITATION = """Li et al., SEED-Bench, arXiv 2307.16125."""


class SEEDBench(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_ARGUMENTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Value("string"),
                    "data_types": datasets.Value("string"),
                    "question_types": datasets.Value("string"),
                }
            ),
        )

    def _compute(self, predictions, references, data_types, question_types):
        return seed_bench_scores(predictions, references, data_types, question_types)
