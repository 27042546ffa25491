"""What is measured of descriptions by models of the small world."""

from collections.abc import Sequence

from .captions import exact_caption
from .evaluate import caption_table, objects_named, score_answer
from .scenes import Scene


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


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
