"""A small world of drawn images, on which the whole AlignGPT pipeline runs on a laptop.

`make_pairs` and `make_conversations` draw data for stage 1 and stage 2; `python -m aligngpt_playground make` writes it
as `datasets` folders, and `python -m aligngpt_playground train-parts` trains the tiny CLIP and Llama kept in `parts/`.
The sprites are OpenMoji's (CC BY-SA 4.0); see ATTRIBUTION.md.
"""

from .captions import KINDS, draw_caption, exact_caption
from .questions import QUESTION_TYPES, all_questions, draw_questions
from .scenes import SPLITS, Scene, draw_scenes, render, split_of
from .sprites import ATTRIBUTION, CATEGORIES, OBJECTS
from .trained import trained_model
from .world import make_conversations, make_pairs, parts_path, write_world


__all__ = [
    "ATTRIBUTION",
    "CATEGORIES",
    "KINDS",
    "OBJECTS",
    "QUESTION_TYPES",
    "SPLITS",
    "Scene",
    "all_questions",
    "draw_caption",
    "draw_questions",
    "draw_scenes",
    "exact_caption",
    "make_conversations",
    "make_pairs",
    "parts_path",
    "render",
    "split_of",
    "trained_model",
    "write_world",
]
