"""Drills: how the tiny Llama learns to find a name of a question among the slots and to carry that to the answer.

In a chat the answer stands six tokens behind the name (`?<|im_end|>\\n<|im_start|>assistant\\n`). Neither finding nor
carrying pays alone there, so both are learned apart, the easier one first: names with what is to be found right behind
each, then the same at a growing distance, then whole chats with some drills among them.
"""

import random

from .captions import NUMBERS
from .questions import Question, all_questions
from .scene_text import ANSWER, BOS, CELLS, GIVEN, IM_END, IM_START, Segment, cell_words, chat_text, draw_texts
from .scenes import PLACES, Scene, draw_scene
from .sprites import CATEGORIES, OBJECTS, plural, with_article


NAMES_A_DRILL = 10
BETWEEN = ("?", IM_END, "\n", IM_START, "assistant", "\n")
"""What stands between the name of a question and its answer in a chat, token by token."""


def _draw_names(scene: Scene, rng: random.Random) -> list[str]:
    """`NAMES_A_DRILL` names, those of the scene among them; half of the others are of the same categories."""
    names = list(dict.fromkeys(scene.names))
    near = [name for shown in names for name in CATEGORIES[OBJECTS[shown]]]
    asked = names + ([rng.choice(names)] if len(names) < 3 else [])
    while len(asked) < NAMES_A_DRILL:
        name = rng.choice(near if rng.random() < 0.5 else tuple(OBJECTS))
        if name not in scene.names:
            asked.append(name)
    rng.shuffle(asked)
    return asked


def _line(scene: Scene, name: str, form: str) -> Question:
    present = name in scene.names
    if form == "where":
        answer = PLACES[dict(scene.objects)[name]] if present else "no"
        return Question("where", f"where is the {name}", answer)
    if form == "yesno":
        return Question("yesno", f"is there {with_article(name)}", "yes" if present else "no")
    if form == "count":
        return Question("count", f"how many {plural(name)} are there", NUMBERS[scene.names.count(name)])
    return Question("list", name, PLACES[dict(scene.objects)[name]] if present else "no")


def drill_text(rng: random.Random, gap: int, forms: tuple[str, ...]) -> list[Segment]:
    """One scene and ten names, each followed by `gap` tokens of `BETWEEN` and by what is to be found.

    Args:
        rng: source of scene and names.
        gap: tokens between a name and its answer, 0 to 6.
        forms: what may be asked: `"list"` (the name alone; its place or "no"), `"where"`, `"yesno"`, `"count"`.
    """
    form = rng.choice(forms)
    scene = draw_scene(rng)
    while scene.repeated and form in ("list", "where"):
        scene = draw_scene(rng)
    text: list[Segment] = [(f"{BOS}", GIVEN), (f"{IM_START}user\n", GIVEN)]
    text += [(cell_words(scene, rng), CELLS), ("\n", GIVEN)]
    for name in _draw_names(scene, rng):
        line = _line(scene, name, form)
        between = "".join(BETWEEN[:gap])
        text += [(f" {line.question} {between} ", GIVEN), (line.answer, ANSWER), (f"{IM_END}\n", GIVEN)]
    return text


def neighbour_text(rng: random.Random) -> list[Segment]:
    """A scene and what stands beside, above or below each of its objects, in the form of a chat."""
    scene = draw_scene(rng)
    while not (questions := all_questions(scene, rng).get("relation", [])):
        scene = draw_scene(rng)
    rng.shuffle(questions)
    return chat_text(scene, rng, questions)


TEXTS, LISTS, GAPS, CHATS, NEIGHBOURS = "texts", "lists", "gaps", "chats", "neighbours"
COURSES = (
    (2e-3, ((TEXTS, 1000),)),
    (2e-3, ((LISTS, 180), (GAPS, 180), (CHATS, 500))),
    (1e-3, ((NEIGHBOURS, 250),)),
)
"""What the Llama is taught, and for how many steps; each course has a learning-rate schedule with a peak of its own."""


def draw_phase(phase: str, done: float, n: int, rng: random.Random) -> list[list[Segment]]:
    """
    Draw a batch of one of the phases of `COURSES`.

    Args:
        phase: its name. done: which share of its steps is done, 0 to 1.
        n: conversations or drills; captions are twice as many.
        rng: source of the choices.
    """
    if phase == TEXTS:
        return draw_texts(n, rng)
    if phase == NEIGHBOURS:
        texts = [neighbour_text(rng) for _ in range(n // 2)]
        texts += [drill_text(rng, 6, ("where", "yesno", "count")) for _ in range(n // 8)]
        return texts + draw_texts(n - len(texts), rng)
    if phase == CHATS:
        drills = round(n * (0.55 - 0.45 * done))
        return [drill_text(rng, 6, ("where", "where", "yesno", "count")) for _ in range(drills)] + draw_texts(
            n - drills, rng
        )
    texts = draw_texts(n // 4, rng)
    for _ in range(n - n // 4):
        if phase == LISTS:
            texts.append(drill_text(rng, 0, ("list",)))
        else:
            texts.append(
                drill_text(rng, rng.randint(0, min(6, 1 + int(6 * done))), ("list", "where", "yesno", "count"))
            )
    return texts
