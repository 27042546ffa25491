"""
The authors' checkpoints to this format: `aligngpt convert`, and back with `--to-original`.

The input is a finetuned model as they released it, or stage 1's `mm_projector_align.bin` with its language model; the
output is a folder that any Auto class loads. What their format holds beyond the weights (config, tokenizer
files, stored constants, dtypes) is kept in the subfolder `original`, so that the way back is exact.
"""

import argparse
import json
import logging
import os
import shutil
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from aligngpt_shared.files import new_folder
from aligngpt_shared.weights import StoredWeights, read_weights, save_model
from modeling_aligngpt.assembly import (
    add_placeholder_tokens,
    extend_rows,
    padded_vocabulary_size,
    placeholder_generation_config,
)
from modeling_aligngpt.chat_templates import CHAT_TEMPLATES, select_chat_template
from modeling_aligngpt.configuration_aligngpt import GATE_CONTEXTS, AlignGPTConfig, answer_openings
from modeling_aligngpt.images_aligngpt import DROPPED
from modeling_aligngpt.modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTMLP
from modeling_aligngpt.new_processor import processor_from_parts

from ..folders import stays_inside
from . import format as original_format
from .format import BUFFERS_FILE, KEPT_FILES, ORIGINAL_FOLDER, RECORD_FILE, OriginalCheckpoint, to_our_key
from .locate import locate


logger = logging.getLogger(__name__)

_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")
_GATE_SEED = 0


def convert_checkpoint(
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    *,
    vision_tower: str | os.PathLike | None = None,
    base_llm: str | os.PathLike | None = None,
    chat_template: str | None = None,
    gate_context: str = "sequence",
    dtype: str | torch.dtype | None = None,
    max_shard_size: str = "5GB",
) -> Path:
    """
    Convert a checkpoint of the authors.

    Args:
        checkpoint: folder or Hub id of a finetuned model, or folder (or file) of `mm_projector_align.bin`.
        output: folder to write, absent or empty.
        vision_tower: folder or Hub id of the tower; by default what their config names, also looked for beside the
            checkpoint.
        base_llm: folder or Hub id of the language model: stage 1's weights and tokenizer, or the tokenizer of a
            finetuned model that was saved without; by default what their config names.
        chat_template: a name of `CHAT_TEMPLATES`; by default "plain" for stage 1, "vicuna_v1" for a Llama without a
            template of its own, else the tokenizer's family.
        gate_context: what the gate reads: "sequence" as the authors' code does, or "first_turn".
        dtype: of the saved weights; by default each keeps its own, and the model's is that of most of them.
        max_shard_size: greatest size of a weight file.

    Returns:
        The output folder.

    Raises:
        ValueError: the output is in use; a file is missing or damaged; the config asks for what is not supported;
            weights are missing, surplus or misshapen (all named).
    """
    if gate_context not in GATE_CONTEXTS:
        raise ValueError(f"gate_context={gate_context!r} is not one of {', '.join(GATE_CONTEXTS)}.")
    if chat_template is not None and chat_template not in CHAT_TEMPLATES:
        raise ValueError(f"chat_template={chat_template!r} is not one of {', '.join(CHAT_TEMPLATES)}.")
    with new_folder(output) as folder:
        source = original_format.open_checkpoint(locate(checkpoint, "checkpoint"))
        tower = _named_part(vision_tower, source, "mm_vision_tower", "--vision-tower")
        llm = None
        if source.is_stage1 or base_llm is not None or not _has_tokenizer(source.folder):
            llm = _named_part(base_llm, source, "_name_or_path", "--base-llm")
        tokenizer_folder = llm if source.is_stage1 or not _has_tokenizer(source.folder) else source.folder
        # without a config transformers would take theirs, whose model_type is ours too, for one of ours
        own = {} if tokenizer_folder == llm else {"config": original_format.text_config(source.config)}
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, **own)
        vocabulary = len(tokenizer)
        placeholder_ids = add_placeholder_tokens(tokenizer)
        if not source.is_stage1:
            original_format.check_depth(source.config, source.weights, "num_hidden_layers", r"^model\.layers\.(\d+)\.")
        config = _our_config(source, llm, tower, placeholder_ids, gate_context)
        weights = _collect_weights(source, llm, tower, config)
        if vocabulary > config.text_config.vocab_size:
            raise ValueError(
                f"{tokenizer_folder}: the tokenizer has {vocabulary} tokens, the model {config.text_config.vocab_size}."
            )
        _keep_original(source, tokenizer_folder, folder / ORIGINAL_FOLDER)
        model = _finish_weights(config, weights, len(tokenizer), dtype)
        model.generation_config = placeholder_generation_config(
            _generation_config(source.folder if llm is None else llm, model.config), model.config, tokenizer
        )
        name = chat_template or ("plain" if source.is_stage1 else _family(tokenizer, config))
        model.config.answer_openings = answer_openings(tokenizer, CHAT_TEMPLATES[name])
        processor = processor_from_parts(
            tokenizer,
            model.config,
            vision_tower=tower,
            chat_template=CHAT_TEMPLATES[name],
            do_pad=source.config.get("image_aspect_ratio", "square") == "pad",
            transparency=DROPPED,  # as their code, by which the weights were trained
        )
        save_model(model, weights, folder, max_shard_size)
        processor.save_pretrained(folder)
    return Path(output)


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def _named_part(given, source: OriginalCheckpoint, field: str, option: str) -> Path:
    """The folder of a part: the one given, or the one that their config names in `field`."""
    reference = given if given is not None else source.config.get(field)
    if not reference:
        raise ValueError(f"{source.folder}: the config has no {field}; name it with {option}.")
    role = option.removeprefix("--").replace("-", " ")
    try:
        return locate(reference, role, near=source.folder)
    except ValueError as error:
        raise ValueError(f"{error} Name it with {option}.") from error


def _our_config(source: OriginalCheckpoint, llm: Path | None, tower: Path, placeholder_ids, gate_context: str):
    """Our config, with the vocabulary still as large as theirs."""
    if source.is_stage1:
        text_config = AutoConfig.from_pretrained(llm).get_text_config()
    else:
        text_config = original_format.text_config(source.config)
    table = source.weights.get(original_format.LEVEL_TABLE)
    gate = source.weights.get("gated_weight_layer.mlp.0.weight")
    shapes = {}
    if table is not None and table.ndim == 2:
        shapes["num_align_levels"] = table.shape[0]
    if gate is not None and gate.ndim == 2:
        shapes["gate_hidden_size"] = gate.shape[0]
    keeps_class_token = source.config.get("mm_vision_select_feature") == "cls_patch"
    vision_config = original_format.vision_config(tower)
    layer, depth = source.config.get("mm_vision_select_layer", -2), vision_config.num_hidden_layers
    if not isinstance(layer, int) or isinstance(layer, bool) or not -depth - 1 <= layer <= depth:
        raise ValueError(f"config.json: mm_vision_select_layer={layer!r} is none of the vision tower's {depth} layers.")
    return AlignGPTConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=placeholder_ids[0],
        align_token_id=placeholder_ids[1],
        vision_feature_layer=layer,
        vision_scales=original_format.vision_scales(source.config, vision_config.image_size),
        vision_feature_select_strategy="full" if keeps_class_token else None,
        align_mode="level" if source.is_stage1 else "gate",
        gate_context=gate_context,
        training_stage="pretrain" if source.is_stage1 else "instruct",
        lm_head_bias="lm_head.bias" in source.weights,
        **shapes,
    )


def _collect_weights(
    source: OriginalCheckpoint, llm: Path | None, tower: Path, config: AlignGPTConfig
) -> StoredWeights:
    """All weights under their names: the checkpoint's, and those of tower and language model where it has none."""
    weights = StoredWeights()
    parts = [source.weights]
    if not source.has_tower:
        parts.append(original_format.tower_weights(tower))
    if source.is_stage1:
        parts.append(read_weights(llm))
        parts[-1].rename(original_format.unwrapped)
    for part in parts:
        for key in part:
            if key not in weights and not original_format.is_buffer(key):
                weights.take(part, key)
    config.lm_head_bias = "lm_head.bias" in weights
    parameters = _on_meta(config).state_dict()
    shapes = {original_format.to_original_key(key): value.shape for key, value in parameters.items()}
    optional = set()
    if source.is_stage1:
        optional |= {key for key in shapes if key.startswith(original_format.GATE_PREFIX)}
    if config.tie_word_embeddings:
        optional.add("lm_head.weight")
    original_format.check_weights(weights, shapes, frozenset(optional))
    if source.is_stage1:
        dtype = weights[original_format.LEVEL_TABLE].dtype
        for key, value in _fresh_gate(config, optional - weights.keys(), dtype).items():
            weights.put(key, value)
    return weights


def _on_meta(config: AlignGPTConfig) -> AlignGPTForConditionalGeneration:
    """The model without its weights."""
    try:
        with torch.device("meta"):
            return AlignGPTForConditionalGeneration(config)
    except Exception as error:  # whatever a damaged value does in a family's own code
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"config.json: no model can be made of it ({type(error).__name__}: {reason}).") from error


def _fresh_gate(config: AlignGPTConfig, names: set[str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The gate as stage 2 finds it after stage 1: at its initial values, the same in every conversion."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_GATE_SEED)
        gate = AlignGPTMLP(
            config.image_seq_length, config.gate_hidden_size, config.num_align_levels - 1, config.projector_hidden_act
        )
    values = {original_format.to_original_key(f"model.align_gate.{key}"): v for key, v in gate.state_dict().items()}
    return {key: value.to(dtype) for key, value in values.items() if key in names}


def _finish_weights(
    config: AlignGPTConfig, weights: StoredWeights, num_tokens: int, dtype: str | torch.dtype | None
) -> AlignGPTForConditionalGeneration:
    """
    Gives the weights our names, room for `num_tokens` and, where one is asked for, a dtype; nothing is read yet.

    Returns:
        The model without its weights, its config finished.
    """
    if dtype is not None:
        wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if not isinstance(wanted, torch.dtype) or not wanted.is_floating_point:
            raise ValueError(f"dtype={dtype!r} is no floating-point type of torch.")
        for key in weights:
            weights.change(key, lambda value: value.to(wanted))
    sizes: Counter[torch.dtype] = Counter()
    for value in weights.values():
        sizes[value.dtype] += value.numel()
    config.dtype = sizes.most_common(1)[0][0]
    if len(sizes) > 1:
        logger.warning(
            "The checkpoint mixes dtypes (%s). Each weight keeps its own; the model is loaded as %s. --dtype chooses "
            "one for all.",
            ", ".join(sorted(str(each).removeprefix("torch.") for each in sizes)),
            str(config.dtype).removeprefix("torch."),
        )
    size = max(padded_vocabulary_size(num_tokens), config.text_config.vocab_size)
    rows = {"model.embed_tokens.weight": config.align_token_id, "lm_head.weight": None, "lm_head.bias": None}
    if config.tie_word_embeddings and "lm_head.weight" in weights:
        weights.drop(["lm_head.weight"])
    for key, align_token_id in rows.items():
        if key in weights:
            weights.change(key, lambda value, token=align_token_id: extend_rows(value, size, token))
    weights.rename(to_our_key)
    config.text_config.vocab_size = size
    return _on_meta(config).to(config.dtype)


def _generation_config(folder: Path, config: AlignGPTConfig) -> GenerationConfig:
    """Their generation config, or what their config says where there is none."""
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    text = config.text_config
    return GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id
    )


def _family(tokenizer, config: AlignGPTConfig) -> str:
    """The finetuned model's chat format: Vicuna for a Llama without a template, else the tokenizer's own family."""
    if config.text_config.model_type == "llama" and not tokenizer.chat_template:
        return "vicuna_v1"
    return select_chat_template(tokenizer)


def _keep_original(source: OriginalCheckpoint, tokenizer_folder: Path, folder: Path) -> None:
    """Store what the way back needs and our format does not hold."""
    folder.mkdir()
    for name in KEPT_FILES:
        origin = source.folder / name
        if not origin.is_file() and not source.is_stage1 and name not in ("config.json", "generation_config.json"):
            origin = tokenizer_folder / name
        if origin.is_file():
            if not stays_inside(origin, origin.parent):
                raise ValueError(f"{origin} is a link out of its folder: replace it by the file that it stands for.")
            shutil.copyfile(origin, folder / name)
    if source.buffers:
        save_file({key: value.contiguous() for key, value in source.buffers.items()}, folder / BUFFERS_FILE)
    record = {
        "stage": 1 if source.is_stage1 else 2,
        "dtypes": {key: str(value.dtype).removeprefix("torch.") for key, value in sorted(source.weights.items())},
    }
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `aligngpt convert`."""
    parser.add_argument("--checkpoint", required=True, help="folder or Hub id to convert (stage 1: with its config)")
    parser.add_argument("--output", required=True, help="folder to write, absent or empty")
    parser.add_argument("--vision-tower", help="folder or Hub id of the vision tower (default: what the config names)")
    parser.add_argument(
        "--base-llm",
        help="folder or Hub id of the language model: for stage 1 checkpoints, and for the tokenizer files where the "
        "checkpoint has none (default: what the config names)",
    )
    parser.add_argument("--chat-template", choices=sorted(CHAT_TEMPLATES), help="default: by stage and tokenizer")
    parser.add_argument("--gate-context", choices=GATE_CONTEXTS, default="sequence", help="default: %(default)s")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the checkpoint's")
    parser.add_argument("--max-shard-size", default="5GB", help="greatest size of a weight file, default: %(default)s")
    parser.add_argument("--to-original", action="store_true", help="the other way: into the authors' format")


def run(args: argparse.Namespace) -> int:
    """Run `aligngpt convert`; the exit code."""
    if args.to_original:
        from .export import export_original, way_back

        if args.dtype or args.chat_template or args.gate_context != "sequence":
            raise ValueError("--dtype, --chat-template and --gate-context have no effect with --to-original.")
        output = export_original(
            args.checkpoint,
            args.output,
            tokenizer=args.base_llm,
            vision_tower=args.vision_tower,
            max_shard_size=args.max_shard_size,
        )
    else:
        output = convert_checkpoint(
            args.checkpoint,
            args.output,
            vision_tower=args.vision_tower,
            base_llm=args.base_llm,
            chat_template=args.chat_template,
            gate_context=args.gate_context,
            dtype=args.dtype,
            max_shard_size=args.max_shard_size,
        )
    files = sorted(path for path in output.rglob("*") if path.is_file())
    total = sum(path.stat().st_size for path in files)
    print(f"Wrote {len(files)} files, {total / 1e6:.1f} MB, to {output}")
    if args.to_original:
        back = way_back(output, args.vision_tower, args.base_llm)
        print(f"Next: use it with the authors' code, or convert it back: {back}")
    else:
        print(f"Next: aligngpt chat --model {output} --image IMAGE")
    return 0
