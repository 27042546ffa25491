"""Questions about a scene, each with its type and its one right answer."""

import random
from dataclasses import dataclass

from .captions import NUMBERS, object_phrase
from .scenes import PLACES, Scene
from .sprites import CATEGORIES, OBJECTS, plural, with_article


@dataclass(frozen=True)
class Question:
    """A question with its answer and type (one of `QUESTION_TYPES`)."""

    type: str
    question: str
    answer: str


NEIGHBOURS = {
    "left of": {1: 0, 3: 2},
    "right of": {0: 1, 2: 3},
    "above": {2: 0, 3: 1},
    "below": {0: 2, 1: 3},
}
"""Direction -> place of the object asked about -> place to look at."""


def _what(scene: Scene, rng: random.Random) -> list[Question]:
    return [Question("what", "what is in the picture?", object_phrase(scene))]


def _count(scene: Scene, rng: random.Random) -> list[Question]:
    name = rng.choice(scene.names)
    return [
        Question("count", f"how many {plural(name)} are there?", NUMBERS[scene.names.count(name)]),
        Question("count", "how many things are there?", NUMBERS[len(scene.objects)]),
    ]


def _background(scene: Scene, rng: random.Random) -> list[Question]:
    return [Question("background", "what is the background?", scene.background)]


def _relation(scene: Scene, rng: random.Random) -> list[Question]:
    if scene.repeated:
        return []
    return [
        Question("relation", f"what is {direction} the {name}?", scene.at(steps[place]))
        for name, place in scene.objects
        for direction, steps in NEIGHBOURS.items()
        if place in steps and scene.at(steps[place])
    ]


def _category(scene: Scene, rng: random.Random) -> list[Question]:
    return [
        Question("category", f"what kind of thing is at the {PLACES[place]}?", OBJECTS[name])
        for name, place in scene.objects
    ]


def _place(scene: Scene, rng: random.Random) -> list[Question]:
    return [Question("place", f"what is at the {PLACES[place]}?", name) for name, place in scene.objects]


def _yesno(scene: Scene, rng: random.Random) -> list[Question]:
    name = rng.choice(scene.names)
    pool = CATEGORIES[OBJECTS[name]] if rng.random() < 0.5 else tuple(OBJECTS)
    absent = rng.choice([other for other in pool if other not in scene.names])
    return [
        Question("yesno", f"is there {with_article(name)}?", "yes"),
        Question("yesno", f"is there {with_article(absent)}?", "no"),
    ]


def _where(scene: Scene, rng: random.Random) -> list[Question]:
    if scene.repeated:
        return []
    return [Question("where", f"where is the {name}?", PLACES[place]) for name, place in scene.objects]


_MAKERS = {
    "what": _what,
    "count": _count,
    "background": _background,
    "relation": _relation,
    "category": _category,
    "place": _place,
    "yesno": _yesno,
    "where": _where,
}
QUESTION_TYPES = tuple(_MAKERS)


def all_questions(scene: Scene, rng: random.Random) -> dict[str, list[Question]]:
    """Question type -> the questions of that type that the scene answers (types without any are left out)."""
    made = {kind: maker(scene, rng) for kind, maker in _MAKERS.items()}
    return {kind: questions for kind, questions in made.items() if questions}


def draw_questions(scene: Scene, n: int, rng: random.Random) -> list[Question]:
    """Draw up to `n` questions of different types, in random order; fewer when the scene answers fewer types."""
    questions = [rng.choice(options) for options in all_questions(scene, rng).values()]
    rng.shuffle(questions)
    return questions[:n]
