"""This format to the authors': for their code, and to show that a conversion lost nothing."""

import functools
import json
import logging
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import GenerationConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from aligngpt_shared.files import new_folder, read_json
from aligngpt_shared.references import is_hub_id
from aligngpt_shared.weights import StoredWeights, read_weights
from modeling_aligngpt.configuration_aligngpt import AlignGPTConfig
from modeling_aligngpt.modeling_aligngpt import AlignGPTForConditionalGeneration
from modeling_aligngpt.processing_aligngpt import AlignGPTProcessor

from .format import (
    BUFFERS_FILE,
    KEPT_FILES,
    ORIGINAL_FOLDER,
    RECORD_FILE,
    STAGE1_WEIGHTS,
    original_fields,
    refuse_adapter,
    to_original_key,
)
from .locate import locate


logger = logging.getLogger(__name__)

_STAGE1_PREFIXES = ("mm_projector.", "align_indicators.")
_TOKENIZER_FILES = tuple(name for name in KEPT_FILES if "token" in name)


def export_original(
    model_dir: str | os.PathLike,
    output: str | os.PathLike,
    *,
    tokenizer: str | os.PathLike | None = None,
    vision_tower: str | os.PathLike | None = None,
    max_shard_size: str = "5GB",
) -> Path:
    """
    Write a model of ours in the authors' format: after stage 1 `mm_projector_align.bin` and its config, else a
    finetuned model in safetensors. A converted checkpoint comes back bit by bit.

    Args:
        model_dir: folder or Hub id of an AlignGPT model.
        output: folder to write, absent or empty.
        tokenizer: folder or Hub id of the language model whose tokenizer files are copied; needed where the model
            was not converted from theirs, because `tokenizer.model` does not follow from a saved tokenizer.
        vision_tower: what their config shall name as the tower; needed in the same case.
        max_shard_size: greatest size of a weight file.

    Returns:
        The output folder.

    Raises:
        ValueError: the output is in use; the model is none of ours; a part that their format needs is not named.
    """
    source = locate(model_dir, "model")
    refuse_adapter(source)
    if not (source / "config.json").is_file() or "vision_config" not in read_json(source / "config.json"):
        raise ValueError(f"{source} is no AlignGPT model in this format: its config.json has no vision_config.")
    kept = source / ORIGINAL_FOLDER
    with new_folder(output) as folder:
        config = AlignGPTConfig.from_pretrained(source)
        record = _valid_record(config, kept / RECORD_FILE)
        is_stage1 = _is_stage1(config) if record is None else record["stage"] == 1
        vocab_size = _vocab_size(config) if record is None else read_json(kept / "config.json")["vocab_size"]
        weights = _original_weights(source, config, is_stage1, vocab_size)
        if record is None:
            _derive_files(config, source, folder, is_stage1, tokenizer, vision_tower)
            buffers = {} if is_stage1 else _rotary_buffers(config)
        else:
            _as_recorded(weights, record["dtypes"], kept)
            for name in KEPT_FILES:
                if (kept / name).is_file():
                    shutil.copyfile(kept / name, folder / name)
            buffers = load_file(kept / BUFFERS_FILE) if (kept / BUFFERS_FILE).is_file() else {}
        for name, value in buffers.items():
            weights.put(name, value)
        if is_stage1:
            torch.save({name: weights.read(name).clone() for name in weights}, folder / STAGE1_WEIGHTS)
        else:
            weights.save(folder, max_shard_size)
    return Path(output)


def way_back(folder: Path, vision_tower: str | None, base_llm: str | None) -> str:
    """The command that converts what [`export_original`] wrote, with the parts that its config does not lead to."""
    words = f"aligngpt convert --checkpoint {folder} --output DIR"
    named = read_json(folder / "config.json").get("mm_vision_tower") or ""
    if not is_hub_id(named):
        try:
            locate(named, "vision tower", near=folder)
        except ValueError:
            words += f" --vision-tower {vision_tower or 'TOWER'}"
    return words + f" --base-llm {base_llm or 'LLM'}" * (folder / STAGE1_WEIGHTS).is_file()


def _valid_record(config: AlignGPTConfig, path: Path) -> dict | None:
    """What was recorded at conversion; `None` if nothing was, or if the model has gone through another stage since."""
    if not path.is_file():
        return None
    record = read_json(path)
    return record if config.training_stage == ("pretrain" if record["stage"] == 1 else "instruct") else None


def _is_stage1(config: AlignGPTConfig) -> bool:
    """Whether the model has been through stage 1 alone, by its `training_stage` or its `align_mode`."""
    stage, mode = config.training_stage, config.align_mode
    if mode not in ("level", "gate", "random"):
        logger.warning("align_mode=%r is not written: the authors' format has no field for it.", mode)
    return stage == "pretrain" or (stage is None and mode == "level")


def _original_weights(source: Path, config: AlignGPTConfig, is_stage1: bool, vocab_size: int) -> StoredWeights:
    """The weights that their format holds, under their names, without the rows of the placeholders; left on disk."""
    weights = read_weights(source)
    with torch.device("meta"):
        expected = AlignGPTForConditionalGeneration(config).state_dict()
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight")
        weights.drop({"lm_head.weight"} & weights.keys())
    wrong = sorted(expected.keys() ^ weights.keys())
    wrong += [name for name in expected.keys() & weights.keys() if expected[name].shape != weights[name].shape]
    if wrong:
        raise ValueError(f"{source}: the weights are not those of its config.json: {', '.join(wrong[:12])}.")
    weights.rename(to_original_key)
    if is_stage1:
        weights.drop([name for name in weights if not name.startswith(_STAGE1_PREFIXES)])
    for name in ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"):
        if name in weights:
            weights.change(name, lambda value: value[:vocab_size])
    return weights


def _as_recorded(weights: StoredWeights, dtypes: dict[str, str], kept: Path) -> None:
    """Leaves exactly the weights that the checkpoint had, in its dtypes."""
    absent = sorted(dtypes.keys() - weights.keys())
    if absent:
        raise ValueError(f"{kept / RECORD_FILE} names weights that the model does not have: {', '.join(absent[:12])}.")
    weights.drop(weights.keys() - dtypes.keys())
    for name, dtype in dtypes.items():
        weights.change(name, functools.partial(torch.Tensor.to, dtype=getattr(torch, dtype)))


def _rotary_buffers(config: AlignGPTConfig) -> dict[str, torch.Tensor]:
    """The rotary frequencies that transformers 4.31 stores with each Llama layer."""
    text = config.text_config
    if text.model_type != "llama":
        return {}
    inv_freq = LlamaRotaryEmbedding(config=text).inv_freq.float()
    name = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    return {name.format(layer): inv_freq.clone() for layer in range(text.num_hidden_layers)}


def _derive_files(config: AlignGPTConfig, source: Path, folder: Path, is_stage1: bool, tokenizer, vision_tower) -> None:
    """Config, generation config and tokenizer files for a model that never was in their format."""
    if vision_tower is None:
        raise ValueError("The authors' config names a vision tower by path or Hub id: pass --vision-tower.")
    processor = AlignGPTProcessor.from_pretrained(source)
    max_length = min(processor.tokenizer.model_max_length, config.text_config.max_position_embeddings)
    fields = original_fields(
        config, bool(processor.image_processor.do_pad), os.fspath(vision_tower), max_length, _vocab_size(config)
    )
    fields["tune_mm_mlp_adapter"] = is_stage1
    (folder / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if is_stage1:
        return
    settings = GenerationConfig.from_pretrained(source).to_diff_dict()
    settings.pop("suppress_tokens", None)
    GenerationConfig.from_dict(settings).save_pretrained(folder)
    if tokenizer is None:
        raise ValueError(
            "The authors' code reads the language model's own tokenizer files (tokenizer.model), which a saved model "
            "does not hold: name the language model with --base-llm."
        )
    language_model = locate(tokenizer, "base llm")
    copied = [name for name in _TOKENIZER_FILES if (language_model / name).is_file()]
    if not copied:
        raise ValueError(f"{language_model} holds no tokenizer files.")
    for name in copied:
        shutil.copyfile(language_model / name, folder / name)


def _vocab_size(config: AlignGPTConfig) -> int:
    """Rows of the vocabulary in front of the placeholders, which were appended to it."""
    return min(config.image_token_id, config.align_token_id)
