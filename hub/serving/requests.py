"""
What a request to `aligngpt serve` may hold: bounds that are looked at before anything is parsed, then an allow-list of
fields, read by pydantic.
"""

import json
from typing import Annotated, Any, Literal

from fastapi import HTTPException
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError

from modeling_aligngpt.images_aligngpt import ImageLimits


MAX_BODY_BYTES = 32 * 2**20
MAX_TURNS, MAX_PARTS, MAX_IMAGES = 64, 256, 8
# of all texts of a request together
MAX_CHARACTERS = 100_000
# of all images of a request together, each padded to a square
MAX_PIXELS = 50_000_000
IMAGE_LIMITS = ImageLimits(
    max_bytes=10 * 2**20, max_pixels=MAX_PIXELS, max_side=7000, formats=("JPEG", "PNG", "WEBP", "GIF")
)
# Each value, part and turn is written with some of these. All of them may stand in the texts; the rest is structure.
MARKS, MAX_MARKS = (b'"', b",", b"[", b"{"), MAX_CHARACTERS + 10_000
# Fields of OpenAI's interface that change no answer; those that would have to, and the values that ask for nothing.
IGNORED = {"metadata", "parallel_tool_calls", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user"}
IDLE: dict[str, tuple] = {
    **dict.fromkeys(("n", "best_of"), (None, 1)),
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "top_logprobs", "logprobs"), (None, False)),
    **dict.fromkeys(("audio", "functions", "logit_bias", "tools"), (None, [], {})),
    "modalities": (None, ["text"]),
    "reasoning_effort": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "tool_choice": (None, "none", "auto"),
}


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class TextPart(_Part):
    type: Literal["text"]
    text: str


class ImageAddress(_Part):
    url: str


class ImagePart(_Part):
    type: Literal["image_url"]
    image_url: ImageAddress


class Message(_Part):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]


class StreamOptions(_Part):
    include_usage: bool | None = None


def _in_a_list(value: Any) -> Any:
    return [] if value is None else [value] if isinstance(value, str) else value


Stop = Annotated[str, StringConstraints(min_length=1, max_length=100)]


class ChatRequest(_Part):
    """`/v1/chat/completions`, and `align_level`."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_TURNS)]
    align_level: Any = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Annotated[list[Stop], Field(max_length=4), BeforeValidator(_in_a_list)] = []
    stream: bool | None = None
    stream_options: StreamOptions | None = None


def parse_request(body: bytes | bytearray) -> ChatRequest:
    """
    The request in a body.

    Raises:
        HTTPException: it is too large, no JSON object (400), asks for what is not served (422), or a value is not right
            (400); each with the name of the field and the reason.
    """
    if sum(map(body.count, MARKS)) > MAX_MARKS:
        raise HTTPException(413, "The request holds too many turns, parts or fields, or too long a text.")
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"The request is no JSON object: {error}.") from None
    if not isinstance(fields, dict):
        raise HTTPException(400, f"The request is no JSON object but {_short(fields)}.")
    for name, value in fields.items():
        if name in IDLE and value not in IDLE[name]:
            raise HTTPException(422, f"{name}={_short(value)} is not supported: leave it out.")
        if name not in IDLE and name not in IGNORED and name not in ChatRequest.model_fields:
            raise HTTPException(422, f"Unexpected fields in the request: this server does not know {name!r:.60}.")
    try:
        return ChatRequest.model_validate(fields)
    except ValidationError as error:
        raise HTTPException(400, _reason(error)) from None


def read_turns(messages: list[Message]) -> tuple[list[dict[str, Any]], list[str]]:
    """
    Turns as the chat template takes them, and the addresses of their images in order. Messages of one role in a row, as
    OpenAI's clients send them, become one turn.

    Raises:
        HTTPException: turns that the model cannot answer, or too much of anything.
    """
    turns: list[dict[str, Any]] = []
    images: list[str] = []
    for number, message in enumerate(messages):
        role, where = "system" if message.role == "developer" else message.role, f"messages.{number} ({message.role})"
        content = message.content
        parts = [TextPart(type="text", text=content)] if isinstance(content, str) else content
        urls = [part.image_url.url for part in parts if isinstance(part, ImagePart)]
        shown = [{"type": "image"} if isinstance(part, ImagePart) else part.model_dump() for part in parts]
        if urls and role != "user":
            raise HTTPException(400, f"{where} holds an image: move it into a user's message.")
        if role == "system" and any(turn["role"] != "system" for turn in turns):
            raise HTTPException(400, f"{where}: a system message may only come first.")
        if role != "system" and not urls and not any(part["text"].strip() for part in shown):
            raise HTTPException(400, f"{where} is empty.")
        images += urls
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += [{"type": "text", "text": "\n"}, *shown]
        else:
            turns.append({"role": role, "content": shown})
    if [turn["role"] for turn in turns if turn["role"] != "system"][:1] != ["user"]:
        raise HTTPException(400, "messages: the first one, but for the system's, must be the user's.")
    parts = [part for turn in turns for part in turn["content"]]
    characters = sum(len(part.get("text", "")) for part in parts)
    for found, most, what in (
        (characters, MAX_CHARACTERS, "characters of text"),
        (len(parts), MAX_PARTS, "parts"),
        (len(images), MAX_IMAGES, "images"),
    ):
        if found > most:
            raise HTTPException(400, f"The request holds {found:,} {what}, at most {most:,} are accepted.")
    return turns, images


def _reason(error: ValidationError) -> str:
    # of the forms that a value could have, the one that it comes closest to
    first = max(error.errors(include_url=False, include_input=False), key=lambda one: len(one["loc"]))
    places = [
        str(part) for part in first["loc"] if part != "str" and not str(part).startswith(("list[", "tagged-union["))
    ]
    return f"{'.'.join(places)}: {first['msg']}."


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else f"{text[:60]}..."
