"""A fresh model put together on disk: the weights of its parts pass through memory a shard at a time."""

import os
import re
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig, PretrainedConfig

from aligngpt_shared.weights import StoredWeights, read_weights, save_model
from modeling_aligngpt import CHAT_TEMPLATES, AlignGPTConfig, AlignGPTForConditionalGeneration, AlignGPTProcessor
from modeling_aligngpt.assembly import (
    assemble,
    extend_rows,
    fresh_parts,
    interpolated,
    padded_vocabulary_size,
    placeholder_generation_config,
    plan,
    vision_config_of,
)
from modeling_aligngpt.backbones import WRAPPER_PREFIXES, backbone_of, read_config

from .folders import local_copy


LANGUAGE_MODEL, TOWER = "model.language_model.", "model.vision_tower."


def write_assembled(
    language_model: str | os.PathLike,
    vision_tower: str | os.PathLike,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    chat_template: str | None = None,
    image_size: int | None = None,
    max_shard_size: str = "5GB",
    **config_overrides,
) -> tuple[AlignGPTForConditionalGeneration, AlignGPTProcessor]:
    """
    What [`assemble`] makes, written into a folder without holding it. Families whose files hold their weights in
    another form than their class are assembled in memory.

    Args:
        language_model, vision_tower, dtype, seed, chat_template, image_size, config_overrides: as [`assemble`].
        folder: where to write.
        max_shard_size: greatest size of a weight file.

    Returns:
        The model (without its weights where they stayed on disk), and its processor.

    Raises:
        ValueError: as [`assemble`]; a weight file that cannot be read.
    """
    settings = {"chat_template": chat_template, "image_size": image_size, **config_overrides}
    config, tokenizer, template = plan(language_model, vision_tower, **settings)
    # both are there: their configs were read
    llm, tower = local_copy(language_model), local_copy(vision_tower)
    weights = _part_weights(config, llm, tower, len(tokenizer), dtype)
    if weights is None:
        model, processor = assemble(language_model, vision_tower, dtype=dtype, seed=seed, **settings)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        processor.save_pretrained(folder)
        return model, processor
    config.dtype = config.text_config.dtype = config.vision_config.dtype = dtype
    with torch.device("meta"):
        model = AlignGPTForConditionalGeneration(config).to(dtype).eval()
    for name, part in fresh_parts(config, seed).items():
        for key, value in part.state_dict().items():
            weights.put(f"model.{name}.{key}", value.to(dtype))
    model.generation_config = placeholder_generation_config(_generation_config(llm), config, tokenizer, template)
    processor = AlignGPTProcessor.from_parts(
        tokenizer, config, vision_tower=vision_tower, chat_template=CHAT_TEMPLATES[template]
    )
    save_model(model, weights, folder, max_shard_size)
    processor.save_pretrained(folder)
    return model, processor


def _part_weights(
    config: AlignGPTConfig, llm: Path, tower: Path, num_tokens: int, dtype: torch.dtype
) -> StoredWeights | None:
    """The parts' weights under the model's names and with its rows; `None` where files and class differ."""
    own_config = read_config(llm, "language model")
    if getattr(own_config, "quantization_config", None) is not None:
        return None
    with torch.device("meta"):
        own = AutoModelForCausalLM.from_config(own_config)
        own_tower = AutoModel.from_config(config.vision_config)
        own_tower = getattr(own_tower, "vision_model", own_tower)
    backbone, head = backbone_of(own), own.get_output_embeddings()
    names = {id(module): name for name, module in own.named_modules()}
    wanted = {
        f"{LANGUAGE_MODEL}{key}": ([f"{names[id(backbone)]}.{key}"], value)
        for key, value in backbone.state_dict().items()
    }
    if head.weight is not backbone.get_input_embeddings().weight and not config.tie_word_embeddings:
        wanted |= {f"lm_head.{key}": ([f"{names[id(head)]}.{key}"], value) for key, value in head.state_dict().items()}
    wanted |= {f"{TOWER}{key}": ([f"vision_model.{key}", key], value) for key, value in own_tower.state_dict().items()}
    vision_config, image_size = vision_config_of(read_config(tower, "vision tower")), _image_size(config.vision_config)
    found = StoredWeights()
    stored = {False: read_weights(llm), True: read_weights(tower)}
    stored[False].rename(partial(re.sub, WRAPPER_PREFIXES, ""))
    for key, (candidates, value) in wanted.items():
        part = stored[key.startswith(TOWER)]
        name = next((each for each in candidates if each in part), None)
        if name is None or not part[name].is_floating_point():
            return None
        found.take(part, name, key)
        found.change(key, lambda stored: stored.to(dtype))
        if key.startswith(TOWER) and part[name].shape != value.shape and image_size != _image_size(vision_config):
            found.change(key, lambda positions: interpolated(positions, vision_config, image_size))
        if found[key].shape != value.shape:
            return None
    size = max(padded_vocabulary_size(num_tokens), config.text_config.vocab_size)
    embedding = LANGUAGE_MODEL + _embedding_name(backbone)
    for key, token in ((embedding, config.align_token_id), ("lm_head.weight", None), ("lm_head.bias", None)):
        if key in found:
            found.change(key, lambda value, token=token: extend_rows(value, size, token))
    return found


def _image_size(vision_config: PretrainedConfig) -> int | None:
    return getattr(vision_config, "image_size", None)


def _embedding_name(model: torch.nn.Module) -> str:
    """The name of the token embeddings' weight."""
    embedding = model.get_input_embeddings()
    return next(f"{name}.weight" for name, module in model.named_modules() if module is embedding)


def _generation_config(llm: Path) -> GenerationConfig:
    """The language model's, as its class would load it."""
    if (llm / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(llm)
    return GenerationConfig.from_model_config(read_config(llm, "language model"))
