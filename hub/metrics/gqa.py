"""GQA accuracy: the answer itself, up to case and punctuation."""

import string
from collections.abc import Sequence


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def is_match(prediction: str, reference: str) -> bool:
    """Whether an answer is the reference, up to case, punctuation and spaces around it."""
    given, wanted = (text.lower().translate(_NO_PUNCTUATION) for text in (prediction.strip(), reference))
    return given == wanted


def gqa_accuracy(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """
    Share of right answers, 0..1.

    Raises:
        ValueError: no predictions, or not as many references.
    """
    if not predictions or len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references: as many are needed.")
    hits = [is_match(*pair) for pair in zip(predictions, references, strict=True)]
    return {"accuracy": sum(hits) / len(hits)}
