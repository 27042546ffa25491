"""The text that the tiny Llama of `parts/llama` is pretrained on: scenes in words, never a picture.

A scene is told by sixteen words, one for each patch of its picture in reading order, at the very places where the picture's
tokens will stand later, and before them, where the alignment vector will stand, a word says how faithful the retelling is.
So a projector has only to learn the way from a patch to a word, and level embeddings have something to align with.
"""

import random

from .captions import KINDS, draw_caption, exact_caption
from .questions import Question, draw_questions
from .scenes import Scene, draw_scene
from .sprites import OBJECTS, with_article


BOS, UNKNOWN, PAD, IM_START, IM_END = "<s>", "<unk>", "<pad>", "<|im_start|>", "<|im_end|>"
FIDELITY_WORDS = KINDS
"""The words of the slot before the cells, in falling order of faithfulness."""

Segment = tuple[str, bool]
"""A piece of text and whether the model is trained to write it."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _slot(word: str, rng: random.Random) -> str:
    return f" {word}" if rng.random() < 0.85 else ""


def cell_words(scene: Scene, rng: random.Random, dropped: float = 0.0) -> str:
    """The sixteen words of a scene; a share `dropped` of those of objects is replaced by the background."""
    return " ".join(scene.background if rng.random() < dropped else word for word in scene.cells())


def plain_text(scene: Scene, rng: random.Random, kind: str | None = None, dropped: float = 0.15) -> list[Segment]:
    """Stage 1's format: slot, cells, caption, newline; then the end, so that generation stops there."""
    kind = kind or rng.choices(KINDS, weights=(5, 2, 2, 2, 2))[0]
    prompt = f"{BOS}{_slot(kind, rng)} {cell_words(scene, rng, dropped)}"
    return [(prompt, False), (f" {draw_caption(scene, kind, rng)}\n{IM_END}", True)]


def _turns(opening: str, questions: list[Question]) -> list[Segment]:
    segments, first = [], True
    for question in questions:
        lead = opening if first else ""
        segments.append((f"{IM_START}user\n{lead}{question.question}{IM_END}\n{IM_START}assistant\n", False))
        segments += [(f"{question.answer}{IM_END}", True), ("\n", False)]
        first = False
    return segments


def chat_text(scene: Scene, rng: random.Random, turns: int = 6, dropped: float = 0.15) -> list[Segment]:
    """Stage 2's format: slot, then a conversation that opens with the cells."""
    opening = f"{cell_words(scene, rng, dropped)}\n"
    segments = _turns(opening, draw_questions(scene, turns, rng))
    slot = _slot(rng.choice(FIDELITY_WORDS), rng)
    return [(f"{BOS}{slot}{segments[0][0]}", False), *segments[1:]]


def told_text(scene: Scene, rng: random.Random, turns: int = 6) -> list[Segment]:
    """A conversation about a scene that the user tells in a sentence; no slot, no cells."""
    segments = _turns(f"{exact_caption(scene)}.\n", draw_questions(scene, turns, rng))
    return [(f"{BOS}{segments[0][0]}", False), *segments[1:]]


def knowledge_text(rng: random.Random) -> list[Segment]:
    """A conversation without any scene."""
    names = rng.sample(tuple(OBJECTS), 4)
    questions = [Question("knowledge", f"what kind of thing is {with_article(name)}?", OBJECTS[name]) for name in names]
    segments = _turns("", [*questions, Question("greeting", "hello", "hello")])
    return [(f"{BOS}{segments[0][0]}", False), *segments[1:]]


def draw_texts(n: int, rng: random.Random) -> list[list[Segment]]:
    """Draw a batch of training texts about training scenes, of one length class, so that little is lost to padding.

    A third of the batches are captions, twice as many of them as `n` because they are short; the others are conversations.
    """
    if rng.random() < 1 / 3:
        return [plain_text(draw_scene(rng), rng) for _ in range(2 * n)]
    texts = []
    for _ in range(n):
        draw = rng.random()
        if draw < 0.87:
            texts.append(chat_text(draw_scene(rng), rng))
        else:
            texts.append(told_text(draw_scene(rng), rng) if draw < 0.97 else knowledge_text(rng))
    return texts
