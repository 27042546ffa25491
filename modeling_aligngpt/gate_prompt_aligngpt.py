"""
Where the first answer begins, which is as far as the gate reads (`gate_context="first_turn"`): the same in training,
in every later turn, and in front of any cache.

Ids know nothing of turns. But a chat template always writes the same between a question and its answer (`ASSISTANT:`,
`[/INST]`): its token ids stand in the config (`answer_openings`), and the gate reads up to the end of the first ones in
a row. A row without them is read whole.
"""

from collections.abc import Sequence

import torch
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template


# Tokens may grow together with the end of a question or the beginning of an answer: two questions for each end, the
# common ends first. An image without words ends like the ones with a space.
_QUESTIONS = (
    *("what is it?", "is it so?", "look at it", "name one", "tell.", "describe it.", "say 3", "count to 3", "stop!"),
    *("go on!", "wait ", "one more ", "(a)", "one (or two)", 'is it "a"', 'say "b"', "它", "其它"),
)
_ANSWERS = ("A cat.", "3", '"a"', "(b)")


def answer_openings(tokenizer, chat_template: str | dict[str, str] | None) -> list[list[int]] | None:
    """
    Token ids that a chat template writes between any question and its answer, as many as are always the same.

    Args:
        tokenizer: of the language model.
        chat_template: a Jinja template, or several by name, of which the one called `default` counts.

    Returns:
        One list, or several where the first token depends on what stands in front of it; `None` where the template
        writes nothing there, or takes no conversation of text alone.
    """
    if isinstance(chat_template, dict):
        chat_template = chat_template.get("default")
    asked = [[{"role": "user", "content": question}] for question in _QUESTIONS]
    chats = [[*chat, {"role": "assistant", "content": answer}] for chat in asked for answer in _ANSWERS]
    settings = {"chat_template": chat_template, **tokenizer.special_tokens_map}
    try:
        prompts = list(render_jinja_template(asked, add_generation_prompt=True, **settings)[0])
        wholes = list(render_jinja_template(chats, **settings)[0])
    except (TemplateError, TypeError, ValueError):
        return None
    prompt_ids, ids = (tokenizer(texts, add_special_tokens=False)["input_ids"] for texts in (prompts, wholes))
    prompt_ids = [each for each in prompt_ids for _ in _ANSWERS]
    # of each prompt, what stays of it when an answer stands behind it
    fronts = [prompt[: _common(prompt, whole)] for prompt, whole in zip(prompt_ids, ids, strict=True)]
    openings: list[list[int]] = []
    size = 2 * len(_ANSWERS)
    for start in range(0, len(fronts), size):
        seen, opening = fronts[: start + size], fronts[start]
        for front in fronts[start : start + size]:
            opening = opening[len(opening) - _common(opening[::-1], front[::-1]) :]
        for number, known in enumerate(openings):
            shorter = opening[len(opening) - _common(opening[::-1], known[::-1]) :]
            others = [*openings[:number], *openings[number + 1 :]]
            # not so short that it stands elsewhere, too
            if shorter and all(first_turn_end(front, [shorter, *others]) == len(front) for front in seen):
                openings[number] = shorter
                break
        else:
            openings.append(opening)
    return openings if all(openings) else None


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids are the same from the start on."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def first_turn_end(ids: Sequence[int], openings: list[list[int]] | None) -> int:
    """How many ids stand in front of the first answer: all of them where no opening is found."""
    ids = list(ids)
    ends = (end for end in range(len(ids)) if any(ids[: end + 1][-len(each) :] == each for each in openings or ()))
    return next(ends, len(ids) - 1) + 1


def behind_first(places: Sequence[torch.Tensor]) -> torch.Tensor:
    """
    What stands behind the first place where tokens follow each other.

    Args:
        places: for each of the tokens, where it stands in the rows, `(B, T)`.

    Returns:
        `(B, T)`, bool.
    """
    size = len(places)
    # by starts of what has something behind it
    found = torch.ones_like(places[0][:, size:])
    for number, place in enumerate(places):
        found = found & place[:, number : number + found.shape[1]]
    if not found.shape[1]:
        return torch.zeros_like(places[0])
    return torch.nn.functional.pad(found.cumsum(1) > 0, (size, 0), value=False)


__all__ = ["answer_openings", "behind_first", "first_turn_end"]
