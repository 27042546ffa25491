"""ScienceQA accuracy: the letter of the choice."""

from collections.abc import Sequence


def is_letter(prediction: str, letter: str) -> bool:
    """
    Whether an answer names the choice: the letter alone (in any case), or a capital letter and a full stop in front of
    more, as LLaVA's evaluation reads it. Anything else is wrong, right or not.
    """
    text, letter = prediction.strip(), letter.strip().lower()
    if text.lower() == letter:
        return True
    return len(text) >= 2 and text[0].isupper() and text[1] == "." and text[0].lower() == letter


def scienceqa_accuracy(predictions: Sequence[str], references: Sequence[str | int]) -> dict[str, float]:
    """
    Share of right choices, 0..1.

    Args:
        predictions: answers.
        references: letters, or 0-based numbers of the choices.

    Raises:
        ValueError: no predictions, or not as many references.
    """
    if not predictions or len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references: as many are needed.")
    letters = [chr(ord("A") + choice) if isinstance(choice, int) else choice for choice in references]
    hits = [is_letter(*pair) for pair in zip(predictions, letters, strict=True)]
    return {"accuracy": sum(hits) / len(hits)}
