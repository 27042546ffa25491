"""
A harder set of questions, reported apart: forms that stage 2 has not trained, with right answers that follow from the
scene. Absent objects are asked for in the three ways of POPE (arXiv 2305.10355).
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .captions import NUMBERS
from .evaluate import SavedModel, question_table
from .questions import NEIGHBOURS, Question
from .scenes import BACKGROUNDS, PLACES, Scene, draw_scenes, render
from .sprites import CATEGORIES, OBJECTS, plural, with_article


POPULAR = 30
"""How many of the objects that training shows most often count as popular."""
TRAINING_SCENES = 3000
"""Scenes that popular objects and each type's most frequent answer are learned from."""


def _absent(kind: str, name: str, absent: str) -> list[Question]:
    return [
        Question(kind, f"is there {with_article(name)}?", "yes"),
        Question(kind, f"is there {with_article(absent)}?", "no"),
    ]


def _objects(scene: Scene, rng: random.Random, popular: Sequence[str]) -> list[Question]:
    """POPE: any object that is absent, a frequent one, or one of the kind of what is there."""
    name = rng.choice(scene.names)
    pools = {
        "absent, random": tuple(OBJECTS),
        "absent, popular": popular,
        "absent, adversarial": CATEGORIES[OBJECTS[name]],
    }
    return [
        question
        for kind, pool in pools.items()
        for question in _absent(kind, name, rng.choice([other for other in pool if other not in scene.names]))
    ]


def _neighbours(scene: Scene) -> list[tuple[str, str, str]]:
    """(neighbour, direction, object): what stands on which side of what."""
    return [
        (beside, direction, name)
        for name, place in scene.objects
        for direction, steps in NEIGHBOURS.items()
        if place in steps and (beside := scene.at(steps[place]))
    ]


_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def _relations(scene: Scene, rng: random.Random) -> list[Question]:
    """The relation in another wording, as a statement to be confirmed, and two hops: what kind of thing, or where."""
    if scene.repeated or not (found := _neighbours(scene)):
        return []
    beside, direction, name = rng.choice(found)
    side = rng.choice((direction, _OPPOSITE[direction]))
    place = next(place for other, place in scene.objects if other == beside)
    return [
        Question("which is left of", f"which thing is {direction} the {name}?", beside),
        Question("is it left of", f"is the {beside} {side} the {name}?", "yes" if side == direction else "no"),
        Question("two hops: kind", f"what kind of thing is {direction} the {name}?", OBJECTS[beside]),
        Question("two hops: place", f"where is the thing {direction} the {name}?", PLACES[place]),
    ]


def _attributes(scene: Scene, rng: random.Random) -> list[Question]:
    """Background, place and number, each to be confirmed."""
    shown = scene.background if rng.random() < 0.5 else rng.choice([b for b in BACKGROUNDS if b != scene.background])
    made = [Question("attribute: background", f"is the background {shown}?", _yes(shown == scene.background))]
    if scene.repeated:
        count, name = len(scene.objects), scene.names[0]
        said = count if rng.random() < 0.5 else rng.choice([n for n in (2, 3, 4) if n != count])
        made.append(Question("attribute: number", f"are there {NUMBERS[said]} {plural(name)}?", _yes(said == count)))
    else:
        name, place = rng.choice(scene.objects)
        said = place if rng.random() < 0.5 else rng.choice([p for p in range(len(PLACES)) if p != place])
        made.append(Question("attribute: place", f"is the {name} at the {PLACES[said]}?", _yes(said == place)))
    return made


def _yes(right: bool) -> str:
    return "yes" if right else "no"


def hard_questions(scene: Scene, rng: random.Random, popular: Sequence[str]) -> list[Question]:
    """The questions of all harder types that a scene answers."""
    return [*_objects(scene, rng, popular), *_relations(scene, rng), *_attributes(scene, rng)]


def popular_objects(scenes: Sequence[Scene]) -> tuple[str, ...]:
    """The objects that most scenes show."""
    counts = Counter(name for scene in scenes for name in set(scene.names))
    return tuple(sorted(counts, key=lambda name: (-counts[name], name))[:POPULAR])


def evaluate_hard(model: str | Path, images: int, seed: int = 0, align_level: int | None = None) -> dict[str, Any]:
    """
    A model of stage 2 on the harder questions about held-out images, each asked alone.

    Args:
        model: its folder.
        images: how many.
        seed: of the images and questions.
        align_level: level that every answer is steered to; None: what the model does by itself.

    Returns:
        `rows` and `overall` (fields of `Accuracy`), and `yes_share`: how often a yes-or-no question got a yes, by type.

    Raises:
        ValueError: fewer than one image, or the folder holds no model.
    """
    if images < 1:
        raise ValueError(f"images is {images}; it must be at least 1")
    saved, rng = SavedModel(model), random.Random(f"hard/{seed}")
    training = list(draw_scenes(TRAINING_SCENES, seed, "train"))
    popular = popular_objects(training)
    scenes = list(draw_scenes(images, seed, "heldout"))
    asked = [
        (image, question)
        for scene in scenes
        for image in [render(scene, rng.random())]
        for question in hard_questions(scene, rng, popular)
    ]
    questions = [question for _, question in asked]
    answers, _ = saved.answer([image for image, _ in asked], [question.question for question in questions], align_level)
    before = [question for scene in training for question in hard_questions(scene, rng, popular)]
    kinds = list(dict.fromkeys(question.type for question in before))
    rows, overall = question_table(answers, questions, before, kinds)
    yes: dict[str, list[bool]] = {}
    for given, question in zip(answers, questions, strict=True):
        if question.answer in ("yes", "no"):
            yes.setdefault(question.type, []).append(given.lower().startswith("yes"))
    return {
        "rows": [asdict(row) for row in rows],
        "overall": asdict(overall),
        "yes_share": {kind: sum(said) / len(said) for kind, said in yes.items()},
        "answers": [
            {"type": question.type, "question": question.question, "expected": question.answer, "answer": given}
            for given, question in zip(answers, questions, strict=True)
        ],
    }
