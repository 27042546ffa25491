"""What is measured of models of the small world: descriptions at each level, the judge, how much the vector matters."""

from collections.abc import Sequence
from typing import Any

from .captions import KINDS, exact_caption
from .evaluate import SavedModel, caption_table, objects_named, score_answer
from .scenes import Scene
from .world import make_pairs


TRUE_KINDS = ("exact", "partial", "loose")
JUDGED_SEED, JUDGE_BATCH = 1000, 50


class LoadedModel(SavedModel):
    """A model in memory that captions and answers."""

    def __init__(self, model, processor, batch_size: int = 128):
        self.model, self.processor, self.batch_size = model.eval(), processor, batch_size


def describe_captions(captions: Sequence[str], scenes: Sequence[Scene]) -> dict[str, float]:
    """Shares of captions: the measures of `caption_table`, exactly the full true caption, naming an absent object."""
    measures = {row.name: row.accuracy for row in caption_table(captions, scenes, scenes)}
    pairs = list(zip(captions, scenes, strict=True))
    absent = [bool(set(objects_named(text)) - set(scene.names)) for text, scene in pairs]
    return {
        **measures,
        "exact": mean([score_answer(text, exact_caption(scene)) for text, scene in pairs]),
        "absent object": mean(absent),
        "words": mean([len(text.split()) for text in captions]),
    }


def by_level(model: SavedModel, images: list, scenes: Sequence[Scene], question: str | None) -> dict[str, Any]:
    """Descriptions at each level, and how far their quality follows it: Spearman's rank correlation of level and share.

    Args:
        model: with levels.
        images, scenes: held out; every other one is described.
        question: what is asked; `None` for captions in stage 1's format.
    """
    tables, images, scenes = [], images[::2], scenes[::2]
    for level in range(model.num_align_levels):
        if question is None:
            texts = model.caption(images, align_level=level)
        else:
            texts = model.answer(images, [question] * len(images), align_level=level)[0]
        tables.append(describe_captions(texts, scenes))
    names = ("main object", "all objects", "exact")
    return {
        "levels": tables,
        "steering": {name: rank_correlation([table[name] for table in tables]) for name in names},
    }


def rank_correlation(values: Sequence[float]) -> float:
    """Spearman's correlation of values with their positions; 0 where all are equal."""
    import numpy as np

    if len(set(values)) == 1:
        return 0.0
    order = np.argsort(np.argsort(values)).astype(float)
    for value in set(values):  # ties share their mean rank
        same = np.asarray(values) == value
        order[same] = order[same].mean()
    return float(np.corrcoef(order, np.arange(len(values)))[0, 1])


def auc(good: Sequence[float], bad: Sequence[float]) -> float:
    """Share of pairs (a good one, a bad one) in which the good one has the higher value; ties, and no pairs, a half."""
    if not good or not bad:
        return 0.5
    wins = sum((g > b) + 0.5 * (g == b) for g in good for b in bad)
    return wins / (len(good) * len(bad))


def judged_captions(number: int) -> list[dict[str, Any]]:
    """Held-out captions, as many of each kind, the same for all seeds."""
    return make_pairs(number, seed=JUDGED_SEED, split="heldout", kinds=KINDS)


def truth_aucs(values: Sequence[float], kinds: Sequence[str]) -> dict[str, float]:
    """How well values tell true captions from untrue ones, and exact from wrong ones."""
    of = {kind: [value for value, k in zip(values, kinds, strict=True) if k == kind] for kind in KINDS}
    return {
        "true from untrue": auc([v for kind in TRUE_KINDS for v in of[kind]], of["wrong"] + of["unrelated"]),
        "exact from wrong": auc(of["exact"], of["wrong"]),
    }


def judge_captions(model: SavedModel, question: str | None, number: int) -> dict[str, dict[str, float]]:
    """AUCs of the judge's mean level and of the likelihood a token at the top level, on held-out captions."""
    rows = judged_captions(number)
    levels, likelihoods = [], []
    for start in range(0, len(rows), JUDGE_BATCH):
        batch = rows[start : start + JUDGE_BATCH]
        inputs = model.processor.judge_inputs(
            [row["image"] for row in batch], [row["caption"] for row in batch], question
        )
        verdict = model.model.judge(**inputs)
        levels += verdict.mean_level.tolist()
        likelihoods += (verdict.log_likelihoods[:, -1] / verdict.num_tokens).tolist()
    kinds = [row["kind"] for row in rows]
    return {"judge": truth_aucs(levels, kinds), "likelihood": truth_aucs(likelihoods, kinds)}


def score_captions(scorer: str, number: int) -> dict[str, float]:
    """AUCs of a scorer on the same captions."""
    from aligngpt_trainers.scoring.scorer import PairScorer

    rows, loaded, values = judged_captions(number), PairScorer(scorer, device="cpu"), []
    for start in range(0, len(rows), JUDGE_BATCH):
        batch = rows[start : start + JUDGE_BATCH]
        prepared = loaded.preprocess([row["image"] for row in batch], [row["caption"] for row in batch])
        values += loaded.score(*prepared[:2]).tolist()
    return truth_aucs(values, [row["kind"] for row in rows])


def loss_by_level(trainer) -> list[float]:
    """Held-out loss when the alignment vector is one row of the table, for each row: how much the vector matters."""
    config, losses = trainer.model.config, []
    before = config.align_mode, config.default_align_level
    try:
        for level in range(config.num_align_levels):
            config.align_mode, config.default_align_level = "fixed", level
            losses.append(trainer.evaluate()["eval_loss"])
    finally:
        config.align_mode, config.default_align_level = before
    return losses


def align_norm(model) -> dict[str, float]:
    """Length of the level table's rows beside that of the words' embeddings."""
    table = model.model.align_embeddings.weight.detach()
    words = model.get_input_embeddings().weight.detach()
    spread = (table - table.mean(0)).norm(dim=1).mean()
    return {
        "levels": float(table.norm(dim=1).mean()),
        "levels_about_their_mean": float(spread),
        "words": float(words.norm(dim=1).mean()),
    }


def mean(values) -> float:
    return sum(values) / len(values)


def spread(values) -> float:
    center = mean(values)
    return (sum((value - center) ** 2 for value in values) / len(values)) ** 0.5
