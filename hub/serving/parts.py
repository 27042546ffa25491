"""What `aligngpt serve` puts into transformers' server: one model by its own classes, levels, and checked requests."""

import asyncio
import time
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from jinja2 import TemplateError
from transformers import StoppingCriteriaList, StopStringCriteria
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.utils import GenerateManager, GenerationState, Modality
from transformers.utils import is_accelerate_available

from modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor
from modeling_aligngpt.images_aligngpt import image_size

from . import judging
from .requests import IMAGE_LIMITS, MAX_IMAGES, MAX_PIXELS, ChatRequest, ResponsesRequest, checked


class AlignGPTModelManager(ModelManager):
    """
    Holds the one model that is served.

    Args:
        model: folder or Hub id, which requests give as `model`.
        revision: of a Hub id.
        kwargs: `device` and `dtype`, see `ModelManager`.
    """

    def __init__(self, model: str, revision: str | None = None, **kwargs):
        self.revision = revision
        self.started = int(time.time())
        # before the parent's, which loads it
        self.pinned = self.process_model_name(model)
        self.source = model
        super().__init__(force_model=model, **kwargs)

    def load_model_and_processor(self, model_id_and_revision: str, **kwargs):
        """As the parent's, but only for the pinned model: a request must not choose what is downloaded and run here."""
        if model_id_and_revision != self.pinned:
            raise ValueError(f"This server has {self.source} and loads no other model.")
        return super().load_model_and_processor(model_id_and_revision, **kwargs)

    def _load_processor(self, model_id_and_revision: str, gguf_file: str | None = None) -> AlignGPTProcessor:
        return AlignGPTProcessor.from_pretrained(self.source, revision=self.revision)

    def _load_model(self, model_id_and_revision: str, tqdm_class=None, progress_callback=None, gguf_file=None):
        import torch

        where: dict[str, Any] = {"revision": self.revision, "dtype": self.dtype}
        if is_accelerate_available():
            model = AlignGPTForConditionalGeneration.from_pretrained(self.source, device_map=self.device, **where)
        else:
            device = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
            model = AlignGPTForConditionalGeneration.from_pretrained(self.source, **where).to(device)
        return model.eval()

    @staticmethod
    def get_model_modality(model, processor=None) -> Modality:
        return Modality.VLM

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict]:
        """What `/v1/models` lists: the model that is served, and not what the cache holds."""
        owner = "" if Path(self.source).is_dir() else self.source.split("/")[0]
        return [{"id": self.source, "object": "model", "created": self.started, "owned_by": owner}]


class LevelGenerateManager(GenerateManager):
    """Hands the level that came with a request on to `generate`, keeps answers within the context, and ends them at
    OpenAI's `stop`, which is not part of the answer."""

    def generate_streaming(self, model, processor, inputs, gen_config, *args, **kwargs):
        inputs, stops = _prepare(model, processor, inputs, gen_config)
        queue, streamer = super().generate_streaming(model, processor, inputs, gen_config, *args, **kwargs)
        return (queue if stops is None else _until(queue, stops)), streamer

    async def generate_non_streaming(self, model, processor, inputs, gen_config, *args, **kwargs):
        inputs, stops = _prepare(model, processor, inputs, gen_config)
        if (asked := judging.current.get()) is not None:
            return await self.async_submit(_best_answer, asked, model, processor, inputs, gen_config, stops or ())
        text, *rest = await super().generate_non_streaming(model, processor, inputs, gen_config, *args, **kwargs)
        return (cut_at(text, stops or ()), *rest)


def _best_answer(asked, model, processor, inputs, gen_config, stops) -> tuple[str, int, Any]:
    """What `generate_non_streaming` returns, of the best of the answers that a request asks to be drawn."""
    sequences = model.generate(**inputs, generation_config=gen_config, num_return_sequences=asked.best_of)
    length, pad = inputs["input_ids"].shape[-1], gen_config.pad_token_id
    answers = sequences[:, length:]
    texts = [cut_at(processor.decode(answer, skip_special_tokens=True), stops) for answer in answers]
    best = asked.choose(model, processor, texts)
    # shorter answers are padded to the longest; where padding is EOS, the first one ends the answer
    padding = (answers[best] == pad).long().cumsum(0) if pad is not None else answers[best].new_zeros(answers.shape[1])
    is_end = pad in model_ends(gen_config)
    return texts[best], length, answers[best][padding <= is_end]


def model_ends(gen_config) -> list[int]:
    """Ids that end an answer."""
    ends = gen_config.eos_token_id
    return ends if isinstance(ends, list) else [ends]


def _prepare(model, processor, inputs, gen_config) -> tuple[dict[str, Any], list[str] | None]:
    """
    The inputs with their level, and the strings that end the answer; `gen_config` loses both and asks for no more
    tokens than there is room for.
    """
    length, limit = inputs["input_ids"].shape[-1], model.config.text_config.max_position_embeddings
    if gen_config.max_new_tokens is not None:
        gen_config.max_new_tokens = min(gen_config.max_new_tokens, limit - length)
    # not a field of GenerationConfig: out before `generate` sees it
    level = gen_config.__dict__.pop("align_level", None)
    more = {} if level is None else {"align_level": level}
    stops, gen_config.stop_strings = gen_config.stop_strings, None
    if stops is not None:
        # the parent hands `generate` the processor for a tokenizer, which this criterion cannot use
        more["stopping_criteria"] = StoppingCriteriaList([StopStringCriteria(processor.tokenizer, stops)])
    return {**inputs, **more}, stops


def cut_at(text: str, stops: list[str] | tuple[str, ...]) -> str:
    """`text` up to the first of the strings that it must not hold."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text


def _until(queue: asyncio.Queue, stops: list[str]) -> asyncio.Queue:
    """A queue of the same pieces up to a stop string; what could be the begin of one waits for what follows."""
    cut: asyncio.Queue = asyncio.Queue()
    longest = max(map(len, stops))

    async def pump():
        held, over = "", False
        while True:
            item = await queue.get()
            if type(item) is not str:
                if item is None and held and not over:
                    cut.put_nowait(cut_at(held, stops))
                cut.put_nowait(item)
                if item is None or isinstance(item, Exception):
                    return
                continue
            held += item
            if over:
                continue
            if (text := cut_at(held, stops)) != held:
                over, held = True, ""
                if text:
                    cut.put_nowait(text)
            elif len(held) > longest:
                cut.put_nowait(held[: -longest + 1] if longest > 1 else held)
                held = held[-longest + 1 :] if longest > 1 else ""

    cut.pump = asyncio.get_running_loop().create_task(pump())  # kept, or it could be collected
    return cut


class LevelGenerationState(GenerationState):
    """As its parent, one thread a model, with [`LevelGenerateManager`]."""

    def get_manager(self, model_id: str, use_cb: bool = False):
        if model_id not in self._generate_managers:
            self._generate_managers[model_id] = LevelGenerateManager()
        return super().get_manager(model_id, use_cb)


class _CheckedRequests:
    """For the handlers of both chat interfaces."""

    request_class: type

    def __init__(self, *args, fetch_urls: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.fetch_urls = fetch_urls

    async def handle_request(self, body: dict, request_id: str):
        """As the parent's, of what a request may hold, with a verdict where it asks for one."""
        body = checked(body, self.request_class)
        asked = judging.Judging.of(body)
        before = judging.current.set(asked)
        try:
            response = await super().handle_request(body, request_id)
        finally:
            judging.current.reset(before)
        return response if asked is None else asked.beside(response)

    def _build_generation_config(self, body: dict, model_generation_config, use_cb: bool = False):
        """As the parent's, carrying the request's `align_level`."""
        config = super()._build_generation_config(body, model_generation_config, use_cb=use_cb)
        if body.get("temperature"):
            config.do_sample = True
        level = body.get("align_level")
        if level is not None:
            levels = self.model_manager.loaded_models[self.model_manager.pinned].model.config.num_align_levels
            if isinstance(level, bool) or not isinstance(level, int) or not 0 <= level < levels:
                raise HTTPException(422, f"align_level={level!r} is not one of the model's levels, 0 to {levels - 1}.")
            config.align_level = level
        return config

    def get_processor_inputs_from_messages(self, messages: list[dict], modality: Modality) -> list[dict]:
        """
        As the parent's, with images decoded: those that come with the request (or by web address, if allowed), after
        their number, sizes and the length of the conversation are known to be within the limits.
        """
        messages = [{**m, "role": "system" if m["role"] == "developer" else m["role"]} for m in messages]
        parsed = super().get_processor_inputs_from_messages(messages, modality)
        images = [part for message in parsed for part in message["content"] if part["type"] == "image"]
        self._check_images(images)
        processor = self.model_manager.loaded_models[self.model_manager.pinned].processor
        self._check_length(parsed, len(images))
        for number, part in enumerate(images):
            try:
                part["image"] = processor.read_image(part.pop("url"), IMAGE_LIMITS, self.fetch_urls)
            except Exception as error:
                raise HTTPException(400, f"Image {number} cannot be read: {error}.") from None
        if (asked := judging.current.get()) is not None:
            asked.take_image([part["image"] for part in images])
        return parsed

    def _check_length(self, parsed: list[dict], num_images: int) -> None:
        loaded = self.model_manager.loaded_models[self.model_manager.pinned]
        processor, limit = loaded.processor, loaded.model.config.text_config.max_position_embeddings
        try:
            text = processor.apply_chat_template(parsed, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:
            raise HTTPException(400, f"messages: {error}.") from None
        length = len(processor.tokenizer(text)["input_ids"]) + num_images * (processor.image_seq_length - 1)
        if length >= limit:
            raise HTTPException(400, f"The conversation takes {length} tokens, the model reads {limit}: shorten it.")

    def _check_images(self, images: list[dict]) -> None:
        allowed = ("data:image/", "http://", "https://") if self.fetch_urls else ("data:image/",)
        if len(images) > MAX_IMAGES:
            raise HTTPException(400, f"The request holds {len(images)} images, at most {MAX_IMAGES} are accepted.")
        pixels = 0
        for number, part in enumerate(images):
            if not part["url"].startswith(allowed):
                # a bare path would be read from this machine's disk
                where = "data URLs (data:image/png;base64,...)" + (" or web addresses" if self.fetch_urls else "")
                raise HTTPException(422, f"Images are accepted as {where}, not {part['url'][:60]!r}.")
            if part["url"].startswith("data:"):
                try:
                    width, height = image_size(part["url"], IMAGE_LIMITS)
                except Exception as error:
                    raise HTTPException(400, f"Image {number} cannot be read: {error}.") from None
                pixels += width * height
        if pixels > MAX_PIXELS:
            raise HTTPException(
                400, f"The images have {pixels:,} pixels together, at most {MAX_PIXELS:,} are accepted."
            )


class ChatHandler(_CheckedRequests, ChatCompletionHandler):
    """`/v1/chat/completions`, with `align_level`."""

    _valid_params_class = None  # `checked` has seen to it
    request_class = ChatRequest


class ResponsesHandler(_CheckedRequests, ResponseHandler):
    """`/v1/responses`, with `align_level`."""

    _valid_params_class = None
    request_class = ResponsesRequest
