"""
Which tokens of a conversation the gate reads (`gate_context`), as the `prompt_mask` that the processor returns.

With `"first_turn"` these are the tokens up to the place where the first answer begins: the same in training, in every
later turn, and in front of any cache. Ids know nothing of turns, so the place is looked for in the text: it is where
the chat template's end of a question and beginning of an answer (`" ASSISTANT:"`) first stand. A text without them is
read whole.
"""

from collections.abc import Sequence

import numpy as np
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template


def answer_opening(tokenizer, chat_template: str | None) -> str | None:
    """What a template writes between a question and its answer; `None` without a template that marks answers."""
    if not chat_template or "generation" not in chat_template:
        return None
    # a word that is no part of any template
    question = "Wherefore"
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": "Therefore"}]
    try:
        rendered: tuple[list[str], list] = render_jinja_template(  # type: ignore[assignment]
            [chat],
            chat_template=chat_template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except (TemplateError, TypeError, ValueError):
        return None
    (text,), spans = rendered
    if not spans or not spans[0] or question not in text:
        return None
    return text[text.rindex(question) + len(question) : spans[0][0][0]] or None


def first_turn(text: str, opening: str | None) -> str | None:
    """The part of `text` in front of its first answer; `None` when there is nothing behind it."""
    if not opening or opening not in text:
        return None
    end = text.index(opening) + len(opening)
    return None if end >= len(text) else text[:end]


def mask_up_to(ids: Sequence[int], attended: Sequence[int], prefix: Sequence[int] | None) -> np.ndarray:
    """
    1 for the attended tokens of a row that agree with `prefix`, from the first one on (all of them when it is `None`).

    Args:
        ids, attended (`(T,)`): the row and its attention mask. prefix: ids of the part that is read.

    Returns:
        `(T,)`, int64.
    """
    mask = np.array(attended.tolist() if hasattr(attended, "tolist") else attended, dtype=np.int64)
    if prefix is not None:
        places = mask.nonzero()[0].tolist()
        shared = 0
        for place, token in zip(places, prefix, strict=False):
            if ids[place] != token:
                break
            shared += 1
        mask[places[shared:]] = 0
    return mask


def without_answers(attention_mask, assistant_masks):
    """The attention mask without the answers' tokens, of the type that came in (tensor or list)."""
    if hasattr(attention_mask, "shape"):
        return attention_mask * (assistant_masks == 0)
    return [
        [int(seen and not answer) for seen, answer in zip(*rows, strict=True)]
        for rows in zip(attention_mask, assistant_masks, strict=True)
    ]


__all__ = ["answer_opening", "first_turn", "mask_up_to", "without_answers"]
