"""What `aligngpt serve` puts into transformers' server: one model by its own classes, levels, and safe pictures."""

import time
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from transformers.cli.serving.chat_completion import ChatCompletionHandler, TransformersCompletionCreateParamsStreaming
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler, TransformersResponseCreateParamsStreaming
from transformers.cli.serving.utils import GenerateManager, GenerationState, Modality
from transformers.utils import is_accelerate_available

from modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor


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
        """As the parent's; whoever can send a request must not choose what is downloaded and run here."""
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
    """Hands the level that came with a request on to `generate`, and keeps answers within the model's context."""

    def generate_streaming(self, model, processor, inputs, gen_config, *args, **kwargs):
        inputs = _prepare(model, inputs, gen_config)
        return super().generate_streaming(model, processor, inputs, gen_config, *args, **kwargs)

    async def generate_non_streaming(self, model, processor, inputs, gen_config, *args, **kwargs):
        inputs = _prepare(model, inputs, gen_config)
        return await super().generate_non_streaming(model, processor, inputs, gen_config, *args, **kwargs)


def _prepare(model, inputs, gen_config) -> dict[str, Any]:
    """The inputs with their level; `gen_config` loses it and asks for no more tokens than there is room for."""
    length, limit = inputs["input_ids"].shape[-1], model.config.text_config.max_position_embeddings
    if length >= limit:
        raise ValueError(f"The conversation takes {length} tokens, the model reads {limit}: shorten it.")
    if gen_config.max_new_tokens is not None:
        gen_config.max_new_tokens = min(gen_config.max_new_tokens, limit - length)
    # not a field of GenerationConfig: out before `generate` sees it
    level = gen_config.__dict__.pop("align_level", None)
    return {**inputs} if level is None else {**inputs, "align_level": level}


class LevelGenerationState(GenerationState):
    """As its parent, one thread a model, with [`LevelGenerateManager`]."""

    def get_manager(self, model_id: str, use_cb: bool = False):
        if model_id not in self._generate_managers:
            self._generate_managers[model_id] = LevelGenerateManager()
        return super().get_manager(model_id, use_cb)


class _LevelsAndSafePictures:
    """For the handlers of both chat interfaces."""

    def __init__(self, *args, fetch_urls: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.fetch_urls = fetch_urls

    def _build_generation_config(self, body: dict, model_generation_config, use_cb: bool = False):
        """As the parent's, carrying the request's `align_level`."""
        config = super()._build_generation_config(body, model_generation_config, use_cb=use_cb)
        level = body.get("align_level")
        if level is not None:
            levels = self.model_manager.loaded_models[self.model_manager.pinned].model.config.num_align_levels
            if isinstance(level, bool) or not isinstance(level, int) or not 0 <= level < levels:
                raise HTTPException(422, f"align_level={level!r} is not one of the model's levels, 0 to {levels - 1}.")
            config.align_level = level
        return config

    def get_processor_inputs_from_messages(self, messages: list[dict], modality: Modality) -> list[dict]:
        """As the parent's, for pictures that come with the request (or by web address, if allowed)."""
        parsed = super().get_processor_inputs_from_messages(messages, modality)
        allowed = ("data:image/", "http://", "https://") if self.fetch_urls else ("data:image/",)
        for message in parsed:
            for part in message["content"]:
                if part["type"] not in ("text", "image"):
                    raise HTTPException(422, f"A part of a message is of type {part['type']!r}: send text and images.")
                if part["type"] == "image" and not part["url"].startswith(allowed):
                    # a bare path would be read from this machine's disk
                    where = "data URLs (data:image/png;base64,...)" + (" or web addresses" if self.fetch_urls else "")
                    raise HTTPException(422, f"Pictures are accepted as {where}, not {part['url'][:60]!r}.")
        return parsed


class _ChatParams(TransformersCompletionCreateParamsStreaming, total=False):
    align_level: int


class _ResponsesParams(TransformersResponseCreateParamsStreaming, total=False):
    align_level: int


class ChatHandler(_LevelsAndSafePictures, ChatCompletionHandler):
    """`/v1/chat/completions`, with `align_level`."""

    _valid_params_class = _ChatParams


class ResponsesHandler(_LevelsAndSafePictures, ResponseHandler):
    """`/v1/responses`, with `align_level`."""

    _valid_params_class = _ResponsesParams
