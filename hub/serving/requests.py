"""
What a request to `aligngpt serve` may hold: an allow-list with bounds, checked before the model is asked.

Requests are read by pydantic; what passes is handed to transformers' handlers in the one form that they read right.
"""

import json
from typing import Annotated, Any, Literal

from fastapi import HTTPException
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from modeling_aligngpt.images_aligngpt import ImageLimits


MAX_BODY_BYTES = 32 * 2**20
MAX_IMAGES = 8
# of all images of a request together
MAX_PIXELS = 50_000_000
IMAGE_LIMITS = ImageLimits(max_bytes=10 * 2**20, max_pixels=MAX_PIXELS)
MAX_TURNS = 64
# drawn for one request, of which the best is given
MAX_ANSWERS = 16
MAX_CHARACTERS = 100_000
# Fields of OpenAI's interfaces that mean nothing here, and the values at which they ask for nothing.
IDLE = {
    "audio": (None,),
    "background": (None, False),
    "frequency_penalty": (None, 0),
    "include": (None, []),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "metadata": None,
    "modalities": (None, ["text"]),
    "n": (None, 1),
    "parallel_tool_calls": None,
    "presence_penalty": (None, 0),
    "previous_response_id": (None,),
    "prompt_cache_key": None,
    "reasoning": (None,),
    "reasoning_effort": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "safety_identifier": None,
    "service_tier": None,
    "store": (None, False),
    "stream_options": None,
    "text": (None, {"format": {"type": "text"}}),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
    "truncation": (None, "disabled"),
    "user": None,
}

StopString = Annotated[str, StringConstraints(min_length=1, max_length=100)]
Text = Annotated[str, StringConstraints(max_length=MAX_CHARACTERS)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Strict):
    type: Literal["text", "input_text", "output_text"]
    text: Text
    annotations: Any = None
    logprobs: Any = None


class ImageAddress(_Strict):
    url: str
    detail: str | None = None


class ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: ImageAddress


class InputImagePart(_Strict):
    type: Literal["input_image"]
    image_url: str
    detail: str | None = None


Part = Annotated[TextPart | ImagePart | InputImagePart, Field(discriminator="type")]


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]
    type: Literal["message"] | None = None
    # what a client hands back of an earlier answer
    id: str | None = None
    status: str | None = None
    name: str | None = None
    refusal: None = None
    annotations: Any = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None


class _Request(_Strict):
    model: str
    align_level: Any = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stream: bool | None = None


class ChatRequest(_Request):
    """`/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_TURNS)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: (
        Annotated[str, StringConstraints(min_length=1)] | list[Annotated[str, StringConstraints(min_length=1)]] | None
    ) = None
    # ours: see `judging.py`
    judge: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_ANSWERS)] | None = None

    @model_validator(mode="after")
    def _check(self) -> "ChatRequest":
        if isinstance(self.stop, list) and len(self.stop) > 4:
            raise ValueError("stop: at most four strings")
        self.stop = [self.stop] if isinstance(self.stop, str) else self.stop
        check_turns(self.messages)
        several = self.best_of is not None and self.best_of > 1
        if self.stream and (self.judge or several):
            raise ValueError(f"{'best_of' if several else 'judge'}: a whole answer is judged; leave out stream")
        if several and not self.temperature:
            raise ValueError("best_of: answers are drawn, and differ, only with a temperature above 0")
        return self


class ResponsesRequest(_Request):
    """`/v1/responses`."""

    input: Text | Annotated[list[Message | Part], Field(min_length=1, max_length=MAX_TURNS)]
    instructions: Text | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _check(self) -> "ResponsesRequest":
        # transformers' server streams where nothing is said, OpenAI's does not
        self.stream = bool(self.stream)
        items = self.input if isinstance(self.input, list) else []
        messages = [item for item in items if isinstance(item, Message)]
        if messages and len(messages) != len(items):
            raise ValueError("input: either messages or the parts of one message, not both")
        if messages:
            check_turns(messages)
        return self


def check_turns(messages: list[Message]) -> None:
    """Raises a ValueError for turns that the model cannot answer."""
    turns = [message for message in messages if message.role in ("user", "assistant")]
    if any(message.role not in ("user", "assistant") for message in messages[1:]):
        raise ValueError("messages: a system message may only be the first")
    for number, message in enumerate(turns):
        expected = "user" if number % 2 == 0 else "assistant"
        if message.role != expected:
            raise ValueError(f"messages: user and assistant take turns; turn {number} is {message.role}'s")
        text = message.content if isinstance(message.content, str) else ""
        parts = message.content if isinstance(message.content, list) else []
        if not text.strip() and not any(not isinstance(part, TextPart) or part.text.strip() for part in parts):
            raise ValueError(f"messages: turn {number} ({message.role}) is empty")
        if message.role == "assistant" and any(not isinstance(part, TextPart) for part in parts):
            raise ValueError(f"messages: turn {number}: an assistant's turn holds text alone")
    if not turns or turns[-1].role != "user":
        raise ValueError("messages: the last message must be the user's")


def checked(body: dict[str, Any], kind: type[_Request]) -> dict[str, Any]:
    """
    A request's body, reduced to the allowed fields.

    Raises:
        HTTPException: 422 for a field or a part that is not known here, 400 for a value that is not right; each with
            the name of the field and the reason.
    """
    asked = {}
    for name, value in body.items():
        if name in IDLE:
            if IDLE[name] is not None and value not in IDLE[name]:
                raise HTTPException(422, f"{name}={_short(value)} is not supported: leave it out.")
        elif name not in kind.model_fields:
            raise HTTPException(422, f"Unexpected fields in the request: {name!r} is none that this server knows.")
        else:
            asked[name] = value
    _check_parts(asked.get("messages", asked.get("input")))
    try:
        request = kind.model_validate(asked)
    except ValidationError as error:
        raise HTTPException(400, _reason(error)) from None
    return request.model_dump(exclude_none=True)


def _check_parts(messages: Any) -> None:
    """Names parts of a kind that is not known, which must not be passed over as if they had not been there."""
    known = ("text", "input_text", "output_text", "image_url", "input_image")
    items = messages if isinstance(messages, list) else []
    for item in items:
        parts = item.get("content") if isinstance(item, dict) and "role" in item else [item]
        for part in parts if isinstance(parts, list) else []:
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind not in (*known, "message"):
                raise HTTPException(
                    422, f"A part of a message is of type {kind!r}: this server takes text and image_url (input_image)."
                )


def _reason(error: ValidationError) -> str:
    # of the forms that a value could have, the one that it comes closest to
    first = max(error.errors(include_url=False, include_input=False), key=lambda one: len(one["loc"]))
    where = ".".join(str(part) for part in first["loc"] if not _is_form(str(part)))
    text = first["msg"].removeprefix("Value error, ")
    return f"{where}: {text}." if where else f"{text}."


def _is_form(part: str) -> bool:
    """Whether a part of pydantic's place is the name of a type, not of a field."""
    return part in ("str", "constrained-str", "Message") or part.startswith(("list[", "tagged-union["))


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}..."
