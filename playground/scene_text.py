"""The text that the tiny Llama of `parts/llama` is pretrained on: scenes in words, never an image.

A scene is told in sixteen slots, one for each patch of its image in reading order, at the very positions where the
image's tokens will stand later. A slot holds the word of what covers the patch, and on top of it, as a sum of
embeddings, the words of its place ("top", "left"): without them a model this small needs very long to learn where a
slot is. So a projector has only to learn the way from a patch to words.

Captions fit their scene to different degrees, as those of the web do, and no text says how well any of them fits: what
a trained model knows of that comes from its levels.
"""

import random

from .captions import KINDS, draw_caption, exact_caption
from .questions import Question, draw_questions
from .scenes import GRID, Scene, draw_scene
from .sprites import OBJECTS, with_article


BOS, UNKNOWN, PAD, IM_START, IM_END = "<s>", "<unk>", "<pad>", "<|im_start|>", "<|im_end|>"
TURNS = 6

Segment = tuple[str, str]
"""A piece of text and what it is: `GIVEN`, `CELLS` (sixteen words with places) or `ANSWER` (what is trained)."""
GIVEN, CELLS, ANSWER = "given", "cells", "answer"
CELL_PLACES = tuple(
    ("top" if row < GRID // 2 else "bottom", "left" if column < GRID // 2 else "right")
    for row in range(GRID)
    for column in range(GRID)
)
"""The two place words of each of the sixteen cells."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def cell_words(scene: Scene, rng: random.Random, dropped: float = 0.0) -> str:
    """The sixteen words of a scene; a share `dropped` of those of objects is replaced by the background."""
    return " ".join(scene.background if rng.random() < dropped else word for word in scene.cells())


def plain_text(scene: Scene, rng: random.Random, kind: str | None = None, dropped: float = 0.15) -> list[Segment]:
    """Stage 1's format: cells, caption, newline; then the end, so that generation stops there."""
    kind = kind or rng.choices(KINDS, weights=(5, 2, 2, 2, 2))[0]
    cells = cell_words(scene, rng, dropped)
    return [(BOS, GIVEN), (cells, CELLS), (f"{draw_caption(scene, kind, rng)}\n{IM_END}", ANSWER)]


def _turns(opening: list[Segment], questions: list[Question]) -> list[Segment]:
    segments: list[Segment] = []
    for question in questions:
        segments += [(f"{IM_START}user\n", GIVEN), *(opening if not segments else [])]
        segments.append((f"{question.question}{IM_END}\n{IM_START}assistant\n", GIVEN))
        segments += [(f"{question.answer}{IM_END}", ANSWER), ("\n", GIVEN)]
    return segments


def chat_text(scene: Scene, rng: random.Random, questions: list[Question], dropped: float = 0.15) -> list[Segment]:
    """Stage 2's format: a conversation that opens with the cells."""
    opening = [(cell_words(scene, rng, dropped), CELLS), ("\n", GIVEN)]
    return [(BOS, GIVEN), *_turns(opening, questions)]


def told_text(scene: Scene, questions: list[Question]) -> list[Segment]:
    """A conversation about a scene that the user tells in a sentence; no cells."""
    return [(BOS, GIVEN), *_turns([(f"{exact_caption(scene)}.\n", GIVEN)], questions)]


def knowledge_text(rng: random.Random) -> list[Segment]:
    """A conversation without any scene."""
    names = rng.sample(tuple(OBJECTS), 4)
    questions = [Question("knowledge", f"what kind of thing is {with_article(name)}?", OBJECTS[name]) for name in names]
    return [(BOS, GIVEN), *_turns([], [*questions, Question("greeting", "hello", "hello")])]


def draw_texts(n: int, rng: random.Random) -> list[list[Segment]]:
    """Draw a batch of training texts about training scenes, of one length class, so that little is lost to padding.

    A third of the batches are captions, twice as many of them as `n` as they are short; the others are conversations.
    """
    if rng.random() < 1 / 3:
        return [plain_text(draw_scene(rng), rng) for _ in range(2 * n)]
    texts = []
    for _ in range(n):
        draw, scene = rng.random(), draw_scene(rng)
        questions = draw_questions(scene, TURNS, rng)
        if draw < 0.87:
            texts.append(chat_text(scene, rng, questions))
        else:
            texts.append(told_text(scene, questions) if draw < 0.97 else knowledge_text(rng))
    return texts
