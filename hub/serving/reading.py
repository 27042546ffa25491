"""
From the bytes of a request to the model's inputs. It runs in a process of its own: decoders hold Python's lock for up
to a second an image, and nothing that a client sends may keep the server's loop from answering others.
"""

import multiprocessing
import os
import signal
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import HTTPException
from jinja2 import TemplateError
from PIL import Image
from transformers.utils import logging

from modeling_aligngpt import AlignGPTConfig, AlignGPTProcessor
from modeling_aligngpt.images_aligngpt import image_size, read_image

from .requests import IMAGE_LIMITS, MAX_PIXELS, ChatRequest, parse_request, read_turns


@dataclass
class Prompt:
    """A request as the model takes it: arrays (one row) and `settings` of `generate`, and what else was asked for."""

    inputs: dict[str, np.ndarray]
    settings: dict[str, Any]
    max_tokens: int | None
    stops: list[str]
    # the answer goes on with the last message
    continues: bool
    seed: int | None
    stream: bool
    with_usage: bool


class Reader:
    """
    Reads requests for one model.

    Args:
        source, revision: folder or Hub id of the model.
        name: by which requests call it.
        fetch_urls: whether images may be web addresses; data URLs always may, files never.
    """

    def __init__(self, source: str, revision: str | None, name: str, fetch_urls: bool):
        self.name, self.fetch_urls = name, fetch_urls
        self.processor = AlignGPTProcessor.from_pretrained(source, revision=revision)
        config = AlignGPTConfig.from_pretrained(source, revision=revision)
        self.num_levels, self.context = config.num_align_levels, config.text_config.max_position_embeddings

    def read(self, body: bytes | bytearray) -> Prompt:
        """The prompt in a request's body; an HTTPException for one that is not accepted."""
        request = parse_request(body)
        if request.model != self.name:
            raise HTTPException(404, f"This server has {self.name!r} and no other model.")
        if request.align_level is not None:
            self._check_level(request.align_level)
        turns, addresses = read_turns(request.messages)
        sources = self._check_images(addresses)
        continues = turns[-1]["role"] == "assistant"
        try:
            text = self.processor.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=not continues, continue_final_message=continues
            )
            "".join([text, *request.stop]).encode()
        except (TemplateError, UnicodeEncodeError) as error:
            raise HTTPException(400, f"messages: {error}.") from None
        length = len(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])
        self._check_length(length + len(sources) * (self.processor.image_seq_length - 1))
        images = [self._decoded(number, source) for number, source in enumerate(sources)]
        inputs = self.processor(text=text, images=images or None, add_special_tokens=False, return_tensors="pt")
        self._check_length(inputs["input_ids"].shape[1])
        return Prompt(
            # not tensors, which would travel by shared memory
            inputs={name: tensor.numpy() for name, tensor in inputs.items()},
            settings=_settings(request),
            max_tokens=request.max_completion_tokens or request.max_tokens,
            stops=request.stop,
            continues=continues,
            seed=request.seed,
            stream=bool(request.stream),
            with_usage=bool(request.stream_options and request.stream_options.include_usage),
        )

    def _check_level(self, level: Any) -> None:
        if isinstance(level, bool) or not isinstance(level, int) or not 0 <= level < self.num_levels:
            last = self.num_levels - 1
            raise HTTPException(422, f"align_level={level!r:.60} is not one of the model's levels, 0 to {last}.")

    def _check_length(self, length: int) -> None:
        if length >= self.context:
            raise HTTPException(
                400, f"The conversation takes {length} tokens, the model reads {self.context}: shorten it."
            )

    def _check_images(self, addresses: list[str]) -> list[str | Image.Image]:
        """What images are decoded from, once their sizes are known to be within the limits."""
        sources: list[str | Image.Image] = []
        pixels = 0
        for number, address in enumerate(addresses):
            fetched = self.fetch_urls and address.startswith(("http://", "https://"))
            if not fetched and not address.startswith("data:image/"):
                # a bare path would be read from this machine's disk
                where = "data URLs (data:image/png;base64,...)" + (" or web addresses" if self.fetch_urls else "")
                raise HTTPException(422, f"Images are accepted as {where}, not {address[:60]!r}.")
            try:
                source = read_image(address, IMAGE_LIMITS, allow_urls=True) if fetched else address
                pixels += max(image_size(source, IMAGE_LIMITS)) ** 2
            except Exception as error:
                raise HTTPException(400, f"Image {number} cannot be read: {error}.") from None
            if pixels > MAX_PIXELS:
                raise HTTPException(
                    400,
                    f"Padded to squares, images 0 to {number} have {pixels:,} pixels together, at most {MAX_PIXELS:,} "
                    "are accepted.",
                )
            sources.append(source)
        return sources

    def _decoded(self, number: int, source: str | Image.Image) -> Image.Image:
        try:
            return self.processor.read_image(source, IMAGE_LIMITS, allow_urls=False)
        except Exception as error:
            raise HTTPException(400, f"Image {number} cannot be read: {error}.") from None


def _settings(request: ChatRequest) -> dict[str, Any]:
    given = request.model_dump(include={"align_level", "temperature", "top_p"}, exclude_none=True)
    if request.temperature == 0:
        return {"do_sample": False} | ({"align_level": given["align_level"]} if "align_level" in given else {})
    return given | ({"do_sample": True} if {"temperature", "top_p"} & set(given) else {})


# ---- the process ----

_reader: Reader | None = None


def start(*args) -> None:
    """Called once in the process, with the arguments of [`Reader`]."""
    global _reader
    # Ctrl-C is for the server, whose end is this process's too, however it comes
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "nice"):
        os.nice(5)
    threading.Thread(target=_end_with_the_server, daemon=True).start()
    logging.set_verbosity_error()
    _reader = Reader(*args)


def _end_with_the_server() -> None:
    if (server := multiprocessing.parent_process()) is not None:
        server.join()
        signal.raise_signal(signal.SIGTERM)


def is_ready() -> bool:
    return _reader is not None


def read(body: bytes | bytearray) -> Prompt:
    """See [`Reader.read`]."""
    assert _reader is not None
    return _reader.read(body)
