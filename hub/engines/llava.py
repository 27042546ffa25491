"""
AlignGPT as a plain LLaVA. With one alignment vector for everything (a level, or a fixed mixture of levels) an AlignGPT
is transformers' `LlavaForConditionalGeneration` with one more token, `<align>`, whose embedding is that vector: any
engine that runs LLaVA runs it, without code of ours. What is lost is the gate's answer to each prompt.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import AddedToken, AutoModel, LlavaConfig, LlavaProcessor

from modeling_aligngpt import AlignGPTConfig, AlignGPTProcessor
from modeling_aligngpt.chat_templates import with_suffix
from modeling_aligngpt.processing_aligngpt import portable_tokenizer_config, rewrite_json


EMBEDDINGS, HEAD, LEVELS = "model.language_model.embed_tokens.weight", "lm_head.weight", "model.align_embeddings.weight"
LEFT_OUT = ("model.align_embeddings.", "model.align_gate.")
# names that llava-hf's checkpoints have; transformers and vLLM read these
RENAMED = (
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
# towers that transformers wraps in a model of one part, whose name llava-hf's checkpoints carry
WRAPPED_TOWERS = ("clip_vision_model", "siglip_vision_model")


def check_exportable(config: AlignGPTConfig) -> None:
    """
    Raises:
        ValueError: naming what this model has and transformers' LLaVA lacks.
    """
    text = config.text_config
    lacking = {
        f"vision_scales={config.vision_scales} (its tower looks at one size)": config.vision_scales is not None,
        "a head with a bias (Phi)": config.lm_head_bias,
        f"logits scaled by {config.head_scale:g}": config.head_scale != 1.0,
        "soft-capped logits": getattr(text, "final_logit_softcapping", None) is not None,
        f"{config.num_prefix_tokens} tokens in front of the patches, all dropped (it drops one)": (
            config.num_prefix_tokens > 1 and config.vision_feature_select_strategy == "default"
        ),
    }
    found = [name for name, is_so in lacking.items() if is_so]
    if found:
        raise ValueError(f"transformers' LLaVA has no {'; no '.join(found)}: serve this model as an AlignGPT.")


def llava_config(config: AlignGPTConfig) -> LlavaConfig:
    """The config of the LLaVA with these parts, its head apart from the embeddings."""
    text = {**config.text_config.to_dict(), "tie_word_embeddings": False}
    plain = LlavaConfig(
        vision_config=config.vision_config.to_dict(),
        text_config=text,
        image_token_index=config.image_token_id,
        projector_hidden_act=config.projector_hidden_act,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        vision_feature_layer=config.vision_feature_layer,
        image_seq_length=config.image_seq_length,
        tie_word_embeddings=False,
    )
    plain.architectures = ["LlavaForConditionalGeneration"]
    plain.dtype = config.dtype
    return plain


def level_weights(config: AlignGPTConfig, align_level: int) -> list[float]:
    """
    One-hot weights of a level.

    Raises:
        ValueError: the level is none of the model's.
    """
    if not 0 <= align_level < config.num_align_levels:
        raise ValueError(f"align level {align_level} is not in 0..{config.num_align_levels - 1} of this model.")
    return [float(level == align_level) for level in range(config.num_align_levels)]


def write_llava(source: Path, folder: Path, weights: Sequence[float]) -> None:
    """
    Writes model and processor as a LLaVA, a shard of weights at a time.

    Args:
        source: folder of an AlignGPT in safetensors.
        folder: where to write.
        weights (`(N,)`): what each level contributes to the alignment vector.

    Raises:
        ValueError: see [`check_exportable`]; no safetensors; a weight that is not expected.
    """
    config = AlignGPTConfig.from_pretrained(source)
    check_exportable(config)
    vector = torch.tensor(weights, dtype=torch.float32) @ _read(source, LEVELS).float()
    vector = vector / _embedding_scale(config)
    _write_weights(source, folder, config, vector)
    llava_config(config).save_pretrained(folder)
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", folder / "generation_config.json")
    _write_processor(AlignGPTProcessor.from_pretrained(source), config, folder)


def _write_weights(source: Path, folder: Path, config: AlignGPTConfig, vector: torch.Tensor) -> None:
    """The weights under their new names, in as many shards as before."""
    files, index, size = weight_files(source), {}, 0
    has_head = any(name == HEAD for file in files for name in _names(file))
    for number, file in enumerate(tqdm(files, desc="weights", unit="file", disable=len(files) == 1), start=1):
        name = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = {}
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                if key.startswith(LEFT_OUT):
                    continue
                value = opened.get_tensor(key)
                if key == EMBEDDINGS:
                    if not has_head:
                        tensors[_renamed(HEAD, config)] = value.clone()
                    value = value.clone()
                    value[config.align_token_id] = vector.to(value.dtype)
                tensors[_renamed(key, config)] = value.contiguous()
        index |= dict.fromkeys(tensors, name)
        size += sum(value.numel() * value.element_size() for value in tensors.values())
        save_file(tensors, folder / name, metadata={"format": "pt"})
    if len(files) > 1:
        content = {"metadata": {"total_size": size}, "weight_map": dict(sorted(index.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _renamed(key: str, config: AlignGPTConfig) -> str:
    for ours, theirs in RENAMED:
        if key.startswith(ours):
            if ours == "model.vision_tower." and config.vision_config.model_type not in WRAPPED_TOWERS:
                theirs = "vision_tower."
            return theirs + key.removeprefix(ours)
    raise ValueError(f"The model has the weight {key}, which no LLaVA has.")


def weight_files(source: Path) -> list[Path]:
    """
    The safetensors files of a model's folder.

    Raises:
        ValueError: there are none.
    """
    files = sorted(source.glob("model*.safetensors"))
    if not files:
        raise ValueError(f"{source} holds no model*.safetensors: save the model with save_pretrained first.")
    return files


def _names(file: Path) -> Iterator[str]:
    with safe_open(file, "pt") as opened:
        yield from opened.keys()


def _read(source: Path, name: str) -> torch.Tensor:
    for file in weight_files(source):
        with safe_open(file, "pt") as opened:
            if name in opened.keys():  # noqa: SIM118
                return opened.get_tensor(name)
    raise ValueError(f"{source} has no weight {name}: it is no whole AlignGPT.")


def _embedding_scale(config: AlignGPTConfig) -> float:
    """What a language model multiplies looked-up embeddings by (Gemma); the alignment vector enters behind that."""
    with torch.device("meta"):
        embedding = AutoModel.from_config(config.text_config).get_input_embeddings()
    scale = getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", 1.0))
    return float(scale)


def _write_processor(processor: AlignGPTProcessor, config: AlignGPTConfig, folder: Path) -> None:
    """A `LlavaProcessor` that gives the ids and pixels of ours for what its chat template writes."""
    tokenizer = processor.tokenizer
    plain = LlavaProcessor(
        image_processor=processor.image_processor,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=with_suffix(processor.chat_template, processor.image_suffix, tokenizer),
        image_token=processor.image_token,
        num_additional_image_tokens=config.num_prefix_tokens,
    )
    plain.save_pretrained(folder)
    rewrite_json(folder / "tokenizer_config.json", _without_our_code)
    # llama.cpp's converter looks for added tokens here
    added = {token: index for index, token in tokenizer.added_tokens_decoder.items() if isinstance(token, AddedToken)}
    table = {str(token): index for token, index in added.items()}
    (folder / "added_tokens.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def _without_our_code(config: dict) -> None:
    config.pop("auto_map", None)
    portable_tokenizer_config(config)
