"""`evaluate` module of MMBench; the rule stands in `scoring.py`."""

import datasets
import evaluate

from .scoring import mmbench_scores


_DESCRIPTION = """Circular evaluation: a question counts when it is answered right in every order of its choices."""
_ARGUMENTS = """
Args:
    predictions: answers.
    references: index, answer (letter), category, and the choices A to D (empty where there are fewer).
"""
_CITATION = """Liu et al., MMBench, ECCV 2024 (arXiv 2307.06281)."""


class MMBench(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_ARGUMENTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": {
                        "index": datasets.Value("int64"),
                        "answer": datasets.Value("string"),
                        "category": datasets.Value("string"),
                        **{letter: datasets.Value("string") for letter in "ABCD"},
                    },
                }
            ),
        )

    def _compute(self, predictions, references):
        return mmbench_scores(
            predictions,
            [{**row, "choices": {letter: row[letter] for letter in "ABCD" if row[letter]}} for row in references],
        )
