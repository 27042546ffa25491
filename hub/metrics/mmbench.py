"""MMBench with circular evaluation: a question counts when it is answered right in every order of its choices."""

from collections.abc import Callable, Sequence
from typing import Any


CIRCULAR_STEP = 1_000_000
"""Copies of question i with its choices turned have the indices i + 1000000, i + 2000000, ..."""
_LETTERS = "ABCDE"
# what may stand around a letter, tried in this order
_AROUND = (
    ("", ""),
    ("", "."),
    ("", ","),
    ("", ":"),
    ("", ")"),
    ("", ")."),
    ("(", ")"),
    ("(", ")."),
    (":", ""),
    (":", ","),
    (":", "."),
    (":", ")"),
    (":", ")."),
)


def read_choice(prediction: str, choices: dict[str, str]) -> str | None:
    """
    The letter that an answer names, as the benchmark's script infers it without a judge: a letter that stands alone
    (an "A" among more than three words may be the article and does not count), a letter beside a bracket, full stop,
    comma or colon, or the text of exactly one choice.

    Args:
        prediction: the answer.
        choices: letter (A to D) -> text.

    Returns:
        The letter, or `None` when none can be inferred.
    """
    words = prediction.split()
    for before, after in _AROUND:
        found = [letter for letter in _LETTERS if before + letter + after in words]
        if len(found) == 1:
            if not before + after and "A" in words and len(words) > 3:
                continue
            return found[0]
    text = prediction.lower()
    named = [letter for letter, choice in choices.items() if str(choice).lower() in text]
    return named[0] if len(named) == 1 else None


def mmbench_scores(
    predictions: Sequence[str],
    references: Sequence[dict[str, Any]],
    judge: Callable[[str, dict[str, Any]], str | None] | None = None,
) -> dict[str, Any]:
    """
    Share of questions, 0..1, that are right in every order of their choices.

    Args:
        predictions: answers.
        references: for each `index` (of the copies: see `CIRCULAR_STEP`), `answer` (letter), `choices` (letter -> text)
            and, where there is one, `category`.
        judge: `(prediction, reference) -> letter or None`, asked where no letter can be inferred; without it such an
            answer is wrong.

    Returns:
        `accuracy`, `vanilla_accuracy` (each question once, in its first order), `by_category`, and `unread`: how many
        answers named no choice.

    Raises:
        ValueError: no predictions, not as many references, or a turned copy without its question.
    """
    if not predictions or len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references: as many are needed.")
    hits: dict[int, list[bool]] = {}
    first: dict[int, bool] = {}
    categories: dict[int, str] = {}
    unread = 0
    for prediction, reference in zip(predictions, references, strict=True):
        index = int(reference["index"])
        letter = read_choice(prediction, reference["choices"])
        if letter is None:
            unread += 1
            letter = judge(prediction, reference) if judge else None
        right = letter == reference["answer"]
        hits.setdefault(index % CIRCULAR_STEP, []).append(right)
        if index < CIRCULAR_STEP:
            first[index] = right
            categories[index] = reference.get("category") or "uncategorized"
    lost = sorted(set(hits) - set(first))
    if lost:
        raise ValueError(f"Question {lost[0]} is there in turned copies alone: its first order is missing.")
    groups: dict[str, list[bool]] = {}
    for index, category in categories.items():
        groups.setdefault(category, []).append(all(hits[index]))
    return {
        "accuracy": sum(map(all, hits.values())) / len(hits),
        "vanilla_accuracy": sum(first.values()) / len(first),
        "by_category": {name: sum(group) / len(group) for name, group in sorted(groups.items())},
        "unread": unread,
    }
