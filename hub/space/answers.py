"""The model: loaded once, asked by `stream_answer`, which also tells what the gate made of the question."""

try:
    # ZeroGPU: has to come before torch
    import spaces
except ImportError:
    spaces = None

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)


MAX_NEW_TOKENS = 256
MAX_SECONDS = 60
MAX_QUESTION_CHARACTERS = 2000

SETTINGS = Path(__file__).parent / "settings.json"


class QuestionError(ValueError):
    """A question that cannot be asked; the message says why, for the person who wrote it."""


@dataclass(frozen=True)
class Alignment:
    """
    What the model made of a question about an image, before it answered.

    Args:
        gate: the gate's weights of levels 0 to N-2.
        shares: what each of the N levels contributes to the alignment vector of this answer.
        similarity: rows of patches: cosine of each patch's token with the prompt's mean embedding; empty when the
            tower's patches form no grid.
    """

    gate: list[float]
    shares: list[float]
    similarity: list[list[float]]


@dataclass(frozen=True)
class Piece:
    """The answer so far; `ending` is set on the last one: `end`, `length`, `time` or `stopped`."""

    text: str
    ending: str | None = None


@dataclass(frozen=True)
class Loaded:
    name: str
    model: Any
    processor: Any

    @property
    def config(self):
        return self.model.config


_loaded: Loaded | None = None


def load(model_id: str | None = None, revision: str | None = None) -> Loaded:
    """
    Loads the model that everything here answers with: the one named, else the environment's `MODEL_ID` (at
    `MODEL_REVISION`), else the one that this folder was made for (settings.json).

    Raises:
        ValueError: no model is named anywhere.
    """
    global _loaded
    if model_id is None and os.environ.get("MODEL_ID"):
        model_id, revision = os.environ["MODEL_ID"], os.environ.get("MODEL_REVISION") or None
    if model_id is None:
        settings = json.loads(SETTINGS.read_text(encoding="utf-8"))
        model_id, revision = settings["model"], settings["revision"]
    if not model_id:
        raise ValueError("No model is named: set MODEL_ID to a folder or a Hub id (and MODEL_REVISION to a commit).")
    where = {"trust_remote_code": True, "revision": revision}
    processor = AutoProcessor.from_pretrained(model_id, **where)
    if not hasattr(processor, "read_image"):
        raise ValueError(f"{model_id} was saved by an older version of AlignGPT: load, save and publish it again.")
    model = AutoModelForImageTextToText.from_pretrained(model_id, dtype="auto", **where).eval()
    if torch.cuda.is_available():
        model.to("cuda")
    name = Path(model_id).resolve().name if Path(model_id).is_dir() else model_id
    _loaded = Loaded(name, model, processor)
    return _loaded


def loaded() -> Loaded:
    """The model that `load` loaded."""
    assert _loaded is not None, "load() comes first"
    return _loaded


def on_gpu(function):
    """Borrows a GPU for each call on ZeroGPU; nothing elsewhere."""
    return function if spaces is None else spaces.GPU(duration=MAX_SECONDS + 30)(function)


@on_gpu
def stream_answer(
    image: Image.Image,
    turns: list[dict[str, str]],
    align_level: int | None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> Iterator[Alignment | Piece]:
    """
    Answers the last of `turns` (`role`, `content`; the first is about the image).

    Args:
        align_level: 0-based level to steer to; `None`: what the model does by itself.
        temperature: 0 takes the likeliest word each time; higher draws.
        top_p: of what is drawn from, the likeliest words of this probability together.

    Yields:
        Once the [`Alignment`], then each longer [`Piece`] of the answer.

    Raises:
        QuestionError: the conversation does not fit the model.
    """
    model = loaded()
    inputs, room = _inputs(model, image, turns)
    yield _alignment(model, inputs, align_level)
    limit = max(1, min(int(max_new_tokens), MAX_NEW_TOKENS, room))
    streamer = TextIteratorStreamer(
        model.processor.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=MAX_SECONDS + 30
    )
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
    )
    work = _Generation(model, inputs, align_level, {"max_new_tokens": limit, **sampling}, streamer)
    work.start()
    text = ""
    try:
        for word in streamer:
            text += word
            yield Piece(text.strip())
        work.join()
    finally:
        # whoever asked may be gone, or have pressed Stop
        work.stop.set()
    if work.error is not None:
        raise work.error
    yield Piece(text.strip(), work.ending)


class _StopWhen(StoppingCriteria):
    def __init__(self, event: Event):
        self.event = event

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


class _Generation(Thread):
    """`generate` beside the streamer; `ending` says why it ended, `error` what went wrong."""

    def __init__(self, loaded: Loaded, inputs, align_level: int | None, settings: dict, streamer: TextIteratorStreamer):
        super().__init__(daemon=True)
        self.loaded, self.inputs, self.align_level, self.settings = loaded, inputs, align_level, settings
        self.streamer, self.stop = streamer, Event()
        self.error: Exception | None = None
        self.ending: str | None = None

    def run(self):
        started = time.monotonic()
        steering = {} if self.align_level is None else {"align_level": self.align_level}
        try:
            output = self.loaded.model.generate(
                **self.inputs,
                **steering,
                **self.settings,
                max_time=MAX_SECONDS,
                streamer=self.streamer,
                stopping_criteria=StoppingCriteriaList([_StopWhen(self.stop)]),
            )
            made = output.shape[1] - self.inputs["input_ids"].shape[1]
            self.ending = self._ending(int(output[0, -1]), made, time.monotonic() - started)
        # what happened is raised in the thread of whoever asked
        except Exception as error:
            self.error = error
        finally:
            self.streamer.end()

    def _ending(self, last_token: int, made: int, seconds: float) -> str:
        ends = self.loaded.model.generation_config.eos_token_id
        if last_token in (ends if isinstance(ends, list) else [ends]):
            return "end"
        if self.stop.is_set():
            return "stopped"
        return "length" if made >= self.settings["max_new_tokens"] else "time" if seconds >= MAX_SECONDS else "end"


def _inputs(loaded: Loaded, image: Image.Image, turns: list[dict[str, str]]) -> tuple[dict[str, torch.Tensor], int]:
    """What the model takes, and how many more tokens fit."""
    question = turns[-1]["content"].strip()
    if not question:
        raise QuestionError("There is no question yet: write one.")
    if len(question) > MAX_QUESTION_CHARACTERS:
        raise QuestionError(
            f"The question has {len(question)} characters, at most {MAX_QUESTION_CHARACTERS} are read: shorten it."
        )
    for token in (loaded.processor.image_token, loaded.processor.align_token):
        if token in question:
            raise QuestionError(f"The question holds {token}, which the model keeps for itself: leave it out.")
    messages = [{"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    messages[0]["content"].insert(0, {"type": "image", "image": image})
    inputs = loaded.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(loaded.model.device)
    inputs["pixel_values"] = inputs["pixel_values"].to(loaded.model.dtype)
    length, limit = inputs["input_ids"].shape[1], getattr(loaded.config.text_config, "max_position_embeddings", None)
    if limit is not None and length >= limit:
        raise QuestionError(f"The conversation takes {length} tokens, the model reads {limit}: clear it and ask again.")
    return inputs, MAX_NEW_TOKENS if limit is None else limit - length


@torch.inference_mode()
def _alignment(loaded: Loaded, inputs: dict[str, torch.Tensor], align_level: int | None) -> Alignment:
    model = loaded.model.model
    tokens_1SD = torch.stack(tuple(model.get_image_features(inputs["pixel_values"]).pooler_output))
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    mean_1D, _ = model.get_prompt_mean(
        inputs["input_ids"], embeds, inputs.get("attention_mask"), inputs.get("prompt_mask")
    )
    rows = torch.zeros(1, dtype=torch.long, device=tokens_1SD.device)
    gate = model.get_gate_weights(tokens_1SD, rows, mean_1D)
    shares = model.get_level_weights(align_level, 1, gate)
    similarity_S = torch.nn.functional.cosine_similarity(tokens_1SD[0].float(), mean_1D.float(), dim=-1).tolist()
    weighed = gate[0].float().tolist() if loaded.config.uses_gate else []
    return Alignment(weighed, shares[0].float().tolist(), _grid(similarity_S, loaded.config))


def _grid(values_S: list[float], config) -> list[list[float]]:
    """Values of the patches in rows; without a class token, which has no place on the image."""
    size, patch = getattr(config.vision_config, "image_size", None), getattr(config.vision_config, "patch_size", None)
    if size is None or patch is None:
        return []
    height, width = (size, size) if isinstance(size, int) else size
    down, across = (patch, patch) if isinstance(patch, int) else patch
    rows, columns = height // down, width // across
    values = values_S[1:] if len(values_S) == rows * columns + 1 else values_S
    if len(values) != rows * columns:
        return []
    return [values[row * columns : (row + 1) * columns] for row in range(rows)]
