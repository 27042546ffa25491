"""`evaluate` module of VQA accuracy (VQAv2, TextVQA, VizWiz); the rule stands in `scoring.py`."""

import datasets
import evaluate

from .scoring import vqa_accuracy


_DESCRIPTION = """VQA accuracy: min(1, people who gave the answer / 3), averaged over leaving out each of the people."""
_ARGUMENTS = """
Args:
    predictions: answers.
    references: for each the human answers (ten).
The configuration (`evaluate.load(path, "textvqa")`) chooses the normalisation: `vqav2` (default), `textvqa`, `vizwiz`.
"""
_CITATION = """Goyal et al., Making the V in VQA Matter, CVPR 2017 (arXiv 1612.00837)."""


class VQAAccuracy(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_ARGUMENTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.List(datasets.Value("string")),
                }
            ),
        )

    def _compute(self, predictions, references):
        return vqa_accuracy(predictions, references, "vqav2" if self.config_name == "default" else self.config_name)
