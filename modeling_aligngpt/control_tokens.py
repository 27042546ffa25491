"""
Text that users write stays text: control tokens in it (`</s>`, `<|im_end|>`, `<image>`, `<align>`) are broken by an
invisible character, so that the tokenizer reads them letter by letter. What a template writes itself is not touched.

transformers 5 can do so too (`sanitize_control_tokens`), but not beside assistant masks, not without tokenizing, and
not on 4.57; a text must be the same ids in training and when the model is asked.
"""

import re
from typing import Any


# U+2060 WORD JOINER: has no width, and no tokenizer joins over it
BREAK = "\u2060"


def control_tokens(tokenizer, chat_template: str | None) -> re.Pattern:
    """The control tokens: special tokens, and added tokens that the chat template writes."""
    own = chat_template or ""
    added = tokenizer.added_tokens_decoder.values()
    found = {t.content for t in added if t.special or (t.content in own and not t.content.isspace())}
    found |= set(tokenizer.all_special_tokens)
    # a token of one character cannot be broken, and is one that people write (CLIP's tokenizers pad with "!")
    found = {token for token in found if len(token) > 1}
    # the longest first, so that a token wins over one inside of it
    return re.compile("|".join(map(re.escape, sorted(found, key=len, reverse=True))) or "(?!)")


def as_text(text: str, tokens: re.Pattern) -> str:
    """`text` with its control tokens broken."""
    return tokens.sub(lambda found: found[0][0] + BREAK + found[0][1:], text)


def sanitized(messages: list[dict[str, Any]], tokens: re.Pattern, placeholder: str) -> list[dict[str, Any]]:
    """
    Messages with control tokens in their texts broken. In string content, `placeholder` is kept, since nothing else can
    say there where an image stands; in a list of parts it is text.
    """
    return [_sanitized(message, tokens, placeholder) for message in messages]


def _sanitized(message: dict[str, Any], tokens: re.Pattern, placeholder: str) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, str):
        pieces = [as_text(piece, tokens) for piece in content.split(placeholder)]
        return {**message, "content": placeholder.join(pieces)}
    if not isinstance(content, (list, tuple)):
        return message
    parts = [
        {**part, "text": as_text(part["text"], tokens)}
        if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)
        else part
        for part in content
    ]
    return {**message, "content": parts}


__all__ = ["BREAK", "as_text", "control_tokens", "sanitized"]
