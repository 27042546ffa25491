"""
Answers of a benchmark -> its figures, where lmms-eval does not score as the paper does, or asks a judge of its own. A
sample has `doc` (the row without images) and `answer`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from aligngpt_hub import metrics
from aligngpt_hub.metrics.vqa_accuracy.scoring import normalize_answer


Samples = Sequence[dict[str, Any]]
Figures = list[tuple[str, float]]


def _answers(samples: Samples) -> list[str]:
    return [sample["answer"] for sample in samples]


def _column(samples: Samples, name: str) -> list[Any]:
    return [sample["doc"][name] for sample in samples]


def is_given(value: Any) -> bool:
    """Whether a cell of a table says something: not empty, not NaN (as a number or as text)."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return False
    return str(value).strip().lower() not in ("", "nan", "none")


def choices_of(doc: dict[str, Any]) -> dict[str, str]:
    """Letter -> choice of an MMBench row, up to the first that is not given."""
    choices: dict[str, str] = {}
    for letter in "ABCD":
        if not is_given(doc.get(letter)):
            break
        choices[letter] = str(doc[letter])
    return choices


def pope(samples: Samples, judgements: Sequence[str] | None = None) -> Figures:
    splits = _column(samples, "category") if all(sample["doc"].get("category") for sample in samples) else None
    scored = metrics.pope_scores(_answers(samples), _column(samples, "answer"), splits)
    figures = [("mean_f1", 100 * scored["mean_f1"])] if splits else []
    names = ("accuracy", "precision", "recall", "f1", "yes_ratio")
    figures += [(name, 100 * scored[name]) for name in names]
    for split, rates in scored.get("by_split", {}).items():
        figures += [(f"{split}/{name}", 100 * rates[name]) for name in names]
    return figures


def mmbench(samples: Samples, judgements: Sequence[str] | None = None) -> Figures:
    """Judgements: one for each sample, empty where its letter needed no judge."""
    given = dict(zip(_column(samples, "index"), judgements or [], strict=False))
    references = [{**sample["doc"], "choices": choices_of(sample["doc"])} for sample in samples]

    def judge(prediction: str, reference: dict[str, Any]) -> str | None:
        return metrics.read_choice(given.get(reference["index"], ""), reference["choices"])

    scored = metrics.mmbench_scores(_answers(samples), references, judge)
    figures = [(name, 100 * scored[name]) for name in ("accuracy", "vanilla_accuracy")]
    figures.append(("answers without a letter", scored["unread"]))
    return figures + [(f"category/{name}", 100 * value) for name, value in scored["by_category"].items()]


def llava_bench(samples: Samples, judgements: Sequence[str]) -> Figures:
    scored = metrics.llava_bench_scores(judgements, _column(samples, "category"))
    figures = [("score", scored["score"])]
    figures += [(f"category/{name}", value) for name, value in scored["by_category"].items()]
    return [*figures, ("judgements without scores", scored["unread"])]


def mm_vet(samples: Samples, judgements: Sequence[str]) -> Figures:
    scored = metrics.mm_vet_scores(judgements, _column(samples, "capability"))
    figures = [("score", scored["score"])]
    figures += [(f"capability/{name}", value) for name, value in scored["by_capability"].items()]
    return [*figures, ("judgements without a grade", scored["unread"])]


# ---- what servers score ----


SUBMISSIONS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "vqav2_test": lambda sample: {
        "question_id": sample["doc"]["question_id"],
        "answer": normalize_answer(sample["answer"], "vqav2"),
    },
    "vizwiz_vqa_test": lambda sample: {
        "image": f"{sample['doc']['question_id']}.jpg",
        "answer": normalize_answer(sample["answer"], "vizwiz"),
    },
}
"""Task -> a sample's row in the file for the server."""
