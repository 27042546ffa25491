"""The model of `aligngpt serve`, and how a prompt becomes text, whole or piece by piece."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import StoppingCriteriaList
from transformers.utils import is_accelerate_available

from modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor

from .reading import Prompt


# of an answer, where neither request nor model says it
MAX_TOKENS = 1024


@dataclass
class Answer:
    """
    Args:
        reason: why it ends, as OpenAI has it: `stop`, or `length`.
        prompt_tokens, tokens: of the prompt, of the answer.
    """

    text: str
    reason: str
    prompt_tokens: int
    tokens: int


class Answerer:
    """
    The model and its tokenizer.

    Args:
        source, revision: folder or Hub id.
        device, dtype: where and as what the weights are loaded.
    """

    def __init__(self, source: str, revision: str | None, device: str, dtype: str):
        self.tokenizer = AlignGPTProcessor.from_pretrained(source, revision=revision).tokenizer
        place = {"device_map": device} if is_accelerate_available() else {}
        model = AlignGPTForConditionalGeneration.from_pretrained(source, revision=revision, dtype=dtype, **place)
        if not place:
            model = model.to(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        self.model = model.eval()
        ends = model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends])

    def answer(self, prompt: Prompt, gone: threading.Event, send: Callable[[str], object] | None) -> Answer:
        """
        Generates an answer.

        Args:
            gone: nobody waits for it any more: it ends with the next token.
            send: gets the text in pieces.
        """
        inputs = {name: torch.from_numpy(array).to(self.model.device) for name, array in prompt.inputs.items()}
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        ids = inputs["input_ids"][0]
        room = self.model.config.text_config.max_position_embeddings - len(ids)
        wanted = prompt.max_tokens or self.model.generation_config.max_new_tokens or MAX_TOKENS
        # a continued message keeps the space in front of its next word, which decoders leave out at the start of a text
        text = _Text(self.tokenizer, ids[-1:].tolist() if prompt.continues else [], prompt.stops, send)
        if prompt.seed is not None:
            torch.manual_seed(prompt.seed)
        self.model.generate(
            **inputs,
            **prompt.settings,
            **({"stop_strings": prompt.stops, "tokenizer": self.tokenizer} if prompt.stops else {}),
            max_new_tokens=min(wanted, room),
            streamer=text,
            stopping_criteria=StoppingCriteriaList(
                [lambda ids, scores, **kwargs: torch.full((len(ids),), gone.is_set(), device=ids.device)]
            ),
        )
        ended = text.is_cut or (text.ids and text.ids[-1] in self.ends)
        return Answer(text.so_far(), "stop" if ended else "length", len(ids), len(text.ids))


class _Text:
    """
    What `generate` writes, as text up to the first stop string. Always decoded as a whole, so that the pieces together
    are the text: transformers' own streamers lose the spaces at the start of a line with Llama's tokenizers.
    """

    def __init__(self, tokenizer, head: list[int], stops: list[str], send: Callable[[str], object] | None):
        self.tokenizer, self.head, self.stops, self.send = tokenizer, head, stops, send
        self.ids: list[int] = []
        self.sent, self.is_cut, self.has_prompt = 0, False, False

    def put(self, ids: torch.Tensor) -> None:
        """From `generate`: the prompt, then token by token."""
        if self.has_prompt:
            self.ids += ids.tolist()
            self._send(max(map(len, self.stops), default=1) - 1)
        self.has_prompt = True

    def end(self) -> None:
        """From `generate`: that was all."""
        self._send(0)

    def so_far(self) -> str:
        """The text up to here."""
        text = self._decode(self.head + self.ids)[len(self._decode(self.head)) :]
        places = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        self.is_cut = bool(places)
        return text[: min(places)] if places else text

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _send(self, held: int) -> None:
        """All that is new but the last `held` characters, which may be the begin of a stop string."""
        if self.send is None:
            return
        text = self.so_far()
        piece = text[self.sent : len(text) if self.is_cut or not held else max(len(text) - held, 0)]
        # nor half a character
        if piece and not (piece.endswith("\ufffd") and not self.is_cut):
            self.send(piece)
            self.sent += len(piece)
