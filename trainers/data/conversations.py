"""One record of any accepted layout -> the standard chat messages, or the reason why it cannot be used."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any


IMAGE_TOKEN = "<image>"
RESERVED = ("<image>", "<align>")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

ACCEPTED = (
    "`messages` (+ `images`), LLaVA's `conversations` (+ `image`), `texts` (+ `images`), `prompt` + `completion`, "
    "`question` + `answer`, or `image` + `caption` or `text` (docs/data.md lists all; `columns` maps other names)"
)

# What other models take, by column and key of a turn. `objects` are what these marks in a text stand for.
FOREIGN = ("video", "videos", "audio", "audios", "tools")
FOREIGN_OF_A_TURN = ("tool_calls", "function_call")
GROUNDING = ("<bbox>", "<ref-object>")

Message = dict[str, Any]


UNREADABLE, EMPTY, UNUSABLE = REASON_KINDS = ("unreadable", "empty", "unusable")
"""Kinds of reasons: an image or a record that is missing or broken, a record without a text, anything else."""
TOO_DEEP = "lists or objects nested too deeply to be read"
ROW_ERRORS = (TypeError, ValueError, AttributeError, KeyError, ArithmeticError, RecursionError)
"""What a row that cannot be used may raise: a `BadRow`, or whatever a value of another kind leads to."""


class Reason(str):
    """Why a record cannot be used, with its `kind`, one of `REASON_KINDS`."""

    kind: str

    def __new__(cls, text: str, kind: str = UNUSABLE):
        reason = super().__new__(cls, text)
        reason.kind = kind
        return reason

    def kept(self) -> str:
        """Kind and text in one string, for a file; [`Reason.read`] reads it back."""
        return f"{self.kind}: {self}"

    @classmethod
    def read(cls, kept: str) -> "Reason":
        kind, colon, text = kept.partition(": ")
        return cls(text, kind) if colon and kind in REASON_KINDS else cls(kept)


class Broken(dict):
    """What could be read of a record that is damaged in its file, and the `problem`. It costs its own row alone."""

    def __init__(self, problem: str, known: dict[str, Any] | None = None):
        super().__init__(known or {})
        self.problem = problem


class BadRow(ValueError):
    """A record that cannot become a training row; the message is the reason, `kind` one of `REASON_KINDS`."""

    def __init__(self, message: str, kind: str = UNUSABLE):
        super().__init__(message)
        self.kind = kind


def reason_of(error: Exception) -> Reason:
    """What an error says about its record."""
    text = str(error)
    if isinstance(error, RecursionError):
        text = TOO_DEEP
    elif isinstance(error, (AttributeError, KeyError)):
        text = f"a value of another kind than expected ({type(error).__name__}: {error})"
    # half a character cannot be written anywhere
    return Reason(text.encode(errors="backslashreplace").decode(), getattr(error, "kind", UNUSABLE))


def _holds(value: Any) -> bool:
    """Whether a value is there: tables fill the gaps of a column with empty ones."""
    if isinstance(value, (dict, list, tuple)):
        return any(map(_holds, value.values() if isinstance(value, dict) else value))
    return value is not None and not (isinstance(value, (str, bytes)) and value in ("", b"", "[]", "{}", "null"))


def refuse_foreign(record: dict[str, Any], layout: tuple[str, ...]) -> None:
    """Raises BadRow for a record that holds more than images and text, and would be learned without it."""
    found = next((column for column in FOREIGN if _holds(record.get(column))), None)
    if found is None and _holds(record.get("objects")):
        texts = str([record[column] for column in layout])
        found = "objects" if any(mark in texts for mark in GROUNDING) else None
    turns = [turn for column in layout if isinstance(record[column], (list, tuple)) for turn in record[column]]
    names = [name for turn in turns if isinstance(turn, dict) for name in FOREIGN_OF_A_TURN if _holds(turn.get(name))]
    if found or names:
        raise BadRow(f"holds `{found or names[0]}`, but the model takes images and text alone")


def _text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def _split_placeholders(text: str) -> list[dict[str, str]]:
    """Text with `<image>` anywhere -> content blocks.

    A single image goes to the front of its message, as in the data code of LLaVA and of the authors. Several keep
    their places, and the text around them its spaces, as when the chat templates read the same text in use.
    """
    text, *behind = text.strip().split(IMAGE_TOKEN)
    if len(behind) == 1:
        text, behind = "", [(text + behind[0]).strip()]
    blocks = [_text(text)] if text else []
    for piece in behind:
        blocks += [{"type": "image"}, _text(piece)] if piece else [{"type": "image"}]
    return blocks


def _content(value: Any, role: str, number: int) -> list[dict[str, str]]:
    """The content of one message: a string or a list of blocks -> blocks `{"type": "image"}` and text."""
    if value is None:
        value = ""
    if isinstance(value, str):
        if role == "user":
            return _split_placeholders(value) if IMAGE_TOKEN in value else ([_text(value)] if value.strip() else [])
        return [_text(value)] if value.strip() else []
    if not isinstance(value, list):
        raise BadRow(f"message {number}: content is a {type(value).__name__}, not a string or a list of blocks")
    blocks = []
    for block in value:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind in ("image", "image_url"):
            blocks.append({"type": "image"})
        elif kind == "text" and isinstance(block.get("text"), str):
            if block["text"]:
                blocks.append(_text(block["text"]))
        elif kind == "text":
            raise BadRow(f"message {number}: a text block has no `text`")
        else:
            raise BadRow(f"message {number}: block of type {kind!r}; accepted are 'image' and 'text'")
    # what is between images is text, too, be it one space
    return blocks if any(block["type"] == "image" or block["text"].strip() for block in blocks) else []


Turns = list[tuple[Any, Any]]  # role and content, in the record's own words


def _spoken(record: dict[str, Any], layout: tuple[str, ...]) -> Turns:
    """A list of turns, with LLaVA's keys or TRL's."""
    turns, role, content = record[layout[0]], "from", "value"
    if not isinstance(turns, (list, tuple)) or not turns:
        raise BadRow(f"`{layout[0]}` is empty or not a list")
    if isinstance(turns[0], dict) and (turns[0].get("role") or (layout == ("messages",) and "from" not in turns[0])):
        role, content = "role", "content"
    if not all(isinstance(turn, dict) and role in turn and content in turn for turn in turns):
        raise BadRow(f"a turn of `{layout[0]}` lacks '{role}' or '{content}'")
    return [(turn[role], turn[content]) for turn in turns]


def _exchanged(record: dict[str, Any], layout: tuple[str, ...]) -> Turns:
    """A list of questions with their answers."""
    turns = record[layout[0]]
    if not isinstance(turns, (list, tuple)) or not turns:
        raise BadRow(f"`{layout[0]}` is empty or not a list")
    if not all(isinstance(turn, dict) and {"user", "assistant"} <= set(turn) for turn in turns):
        raise BadRow(f"a turn of `{layout[0]}` lacks 'user' or 'assistant'")
    return [(role, turn[role]) for turn in turns for role in ("user", "assistant")]


def _prompted(record: dict[str, Any], layout: tuple[str, ...]) -> Turns:
    """A question and an answer, or lists of messages in place of them."""
    pairs = []
    for column, role in zip(layout, ("user", "assistant"), strict=True):
        value = record[column]
        if isinstance(value, list):
            pairs.extend((turn.get("role"), turn.get("content")) for turn in value)
        else:
            pairs.append((role, value))
    return pairs


def _asked(record: dict[str, Any], layout: tuple[str, ...]) -> Turns:
    """A question, with its `input` where there is one, and an answer, or the most frequent of several."""
    question, answer = (record[column] for column in layout)
    if layout[0] == "instruction" and record.get("input"):
        question = f"{question}\n{record['input']}"
    answers = [each.get("answer") if isinstance(each, dict) else each for each in _several(answer)]
    found = Counter(each for each in answers if each is not None).most_common(1)
    answer = found[0][0] if found else ""
    return [("user", question), ("assistant", str(answer) if isinstance(answer, (int, float)) else answer)]


def _several(value: Any) -> list[Any] | tuple[Any, ...]:
    return value if isinstance(value, (list, tuple)) else [value]


def _captioned(record: dict[str, Any], layout: tuple[str, ...]) -> Turns:
    return [("user", ""), ("assistant", record[layout[0]])]


# The layouts of a record: the columns that make one, and how its turns are read. The first that is present wins.
LAYOUTS: dict[tuple[str, ...], Callable[[dict[str, Any], tuple[str, ...]], Turns]] = {
    ("messages",): _spoken,
    ("conversations",): _spoken,
    ("prompt", "completion"): _prompted,
    ("caption",): _captioned,
    ("text",): _captioned,
    ("texts",): _exchanged,
    ("question", "answer"): _asked,
    ("question", "answers"): _asked,
    ("query", "response"): _asked,
    ("instruction", "output"): _asked,
    ("captions",): _captioned,
    ("alt_text",): _captioned,
    ("alt",): _captioned,
}
PAIRS = {layout for layout, read in LAYOUTS.items() if read is _captioned}
MORE = ("system", "input")  # columns that some layouts read besides


def find_layout(columns: Any) -> tuple[str, ...] | None:
    """The layout whose columns are all in `columns`, or None."""
    return next((layout for layout in LAYOUTS if all(name in columns for name in layout)), None)


def captions_apart(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The record once for each of its captions, where it has a list of them."""
    layout = find_layout({column for column in record if record[column] is not None})
    captions = record[layout[0]] if layout in PAIRS and not isinstance(record, Broken) else None
    if not isinstance(captions, (list, tuple)) or not captions:
        return [record]
    return [{**record, layout[0]: caption} for caption in captions]


def _check_order(roles: list[str]) -> None:
    spoken = roles[1:] if roles[0] == "system" else roles
    if not spoken or spoken[0] != "user":
        raise BadRow(f"the conversation does not begin with human/user but with {(spoken or roles)[0]!r}")
    for number, role in enumerate(spoken):
        if role != ("user", "assistant")[number % 2]:
            raise BadRow(f"turns do not alternate: {' '.join(spoken[: number + 1][-4:])}")
    if spoken[-1] != "assistant":
        raise BadRow("the conversation ends without an answer")


def to_messages(record: dict[str, Any], layout: tuple[str, ...], num_images: int) -> list[Message]:
    """Standard chat messages of one record.

    Args:
        record: the columns of `layout`, and maybe more.
        layout: one of `LAYOUTS`.
        num_images: how many images the record has. Where a layout other than LLaVA's names no placeholder, that
            many are put in front of the first user message, as TRL does.

    Returns:
        `[{"role", "content": [{"type": "image"}, {"type": "text", "text"}, ...]}, ...]`

    Raises:
        BadRow: saying what is wrong.
    """
    refuse_foreign(record, layout)
    messages = []
    turns = LAYOUTS[layout](record, layout)
    if layout not in PAIRS and record.get("system") and turns[0][0] != "system":
        turns.insert(0, ("system", record["system"]))
    for number, (speaker, content) in enumerate(turns):
        role = ROLES.get(speaker)
        if role is None:
            raise BadRow(f"message {number}: role {speaker!r}; accepted are {', '.join(ROLES)}")
        messages.append({"role": role, "content": _content(content, role, number)})
    _check_order([message["role"] for message in messages])
    for number, message in enumerate(messages):
        if message["role"] == "assistant" and not message["content"]:
            raise BadRow(f"message {number}: empty answer", EMPTY)
        for block in message["content"]:
            if block["type"] == "image" and message["role"] != "user":
                raise BadRow(f"message {number}: an image in a {message['role']} message")
            used = [token for token in RESERVED if token in block.get("text", "")]
            if used:
                raise BadRow(f"message {number}: the {message['role']} text contains {used[0]}, which is reserved")
    placeholders = sum(block["type"] == "image" for message in messages for block in message["content"])
    if placeholders == 0 and num_images and layout != ("conversations",):
        first = next(message for message in messages if message["role"] == "user")
        first["content"] = [{"type": "image"}] * num_images + first["content"]
        placeholders = num_images
    if placeholders != num_images:
        raise BadRow(f"{num_images} image(s) but {placeholders} {IMAGE_TOKEN} placeholder(s)")
    for number, message in enumerate(messages):
        if message["role"] == "user" and not message["content"]:
            raise BadRow(f"message {number}: empty question")
    return messages


def caption_of(messages: list[Message]) -> str:
    """What the assistant says, as one line of text: the caption of a stage-1 row."""
    texts = [
        block["text"]
        for message in messages
        if message["role"] == "assistant"
        for block in message["content"]
        if block["type"] == "text"
    ]
    return re.sub(r"\s+", " ", " ".join(texts)).strip()
