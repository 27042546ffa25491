"""What the commands `aligngpt pretrain`, `aligngpt instruct` and `aligngpt score` do."""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers.utils import logging

from modeling_aligngpt import CHAT_TEMPLATES, AlignGPTForConditionalGeneration, AlignGPTProcessor
from modeling_aligngpt.assembly import assemble

from .data import load_rows
from .instruct_config import AlignGPTInstructConfig
from .instruct_trainer import AlignGPTInstructTrainer
from .pretrain_config import AlignGPTPretrainConfig
from .pretrain_trainer import AlignGPTPretrainTrainer
from .settings import parse_settings
from .stage import StageConfig, StageTrainer, find_last_checkpoint


logger = logging.get_logger(__name__)

DTYPES = ("float32", "bfloat16")


@dataclass
class DataArguments:
    """Where the rows come from; see [`load_rows`]."""

    dataset: str | None = field(
        default=None,
        metadata={"help": "Rows to train on: JSON(L), CSV or parquet file, folder of `save_to_disk`, or Hub id."},
    )
    dataset_split: str | None = field(default=None, metadata={"help": "Split; default: train, or the only one."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of a Hub data set."})
    eval_dataset: str | None = field(default=None, metadata={"help": "Rows to evaluate on (see `eval_strategy`)."})
    eval_split: str | None = field(default=None, metadata={"help": "Split of `eval_dataset`."})
    image_folder: str | None = field(
        default=None, metadata={"help": "What relative picture paths start from; default: the folder of the file."}
    )
    on_bad_row: str = field(
        default="raise",
        metadata={
            "help": "Rows that cannot be used: `raise` or `skip` (left out, counted).",
            "choices": ["raise", "skip"],
        },
    )


@dataclass
class ModelArguments:
    """Which model is trained and how it is loaded."""

    model: str | None = field(default=None, metadata={"help": "An AlignGPT: folder or Hub id."})
    model_revision: str | None = field(default=None, metadata={"help": "Revision of a model on the Hub."})
    dtype: str = field(
        default="float32",
        metadata={
            "help": "Of the loaded weights. With `bfloat16` (needs bf16) only what trains is kept in float32.",
            "choices": list(DTYPES),
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention, such as `sdpa`, `flash_attention_2`, `eager`."}
    )


@dataclass
class PretrainModelArguments(ModelArguments):
    """`model`, or `language_model` and `vision_tower` that a fresh one is assembled from."""

    language_model: str | None = field(
        default=None, metadata={"help": "Causal language model to start from: folder or Hub id."}
    )
    vision_tower: str | None = field(
        default=None, metadata={"help": "CLIP or SigLIP model, or its vision tower: folder or Hub id."}
    )
    chat_template: str | None = field(
        default=None,
        metadata={
            "help": f"Conversation format: {', '.join(CHAT_TEMPLATES)}. Default: recognised from the language model."
        },
    )
    num_align_levels: int | None = field(
        default=None, metadata={"help": "Size of the level table of a fresh model (paper: 8)."}
    )
    config_overrides: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "More fields of AlignGPTConfig for a fresh model, as a mapping."}
    )


def pretrain_command(argv: Sequence[str]) -> dict[str, Any]:
    """`aligngpt pretrain`: stage 1. Returns the summary that it writes."""
    model_args, data_args, config = parse_settings(
        "aligngpt pretrain",
        (PretrainModelArguments, DataArguments, AlignGPTPretrainConfig),
        argv,
        "Stage 1: train projector and level embeddings on pairs with an `align_level` (see `aligngpt score`).",
    )
    _check_run(model_args, data_args, config)
    parts = {"language_model": model_args.language_model, "vision_tower": model_args.vision_tower}
    missing = [name for name, value in parts.items() if value is None]
    if model_args.model is None and missing:
        raise ValueError(
            f"{' and '.join(missing)} missing: give language_model and vision_tower (a fresh model is assembled from "
            "them), or model (an AlignGPT)."
        )
    if model_args.model is not None:
        fresh_only = {**parts, "chat_template": None, "num_align_levels": None, "config_overrides": None}
        given = [name for name in fresh_only if getattr(model_args, name) is not None]
        if given:
            raise ValueError(
                f"{', '.join(given)} has no effect on a finished model: leave it out, or leave `model` out."
            )
        model, processor = _load(model_args)
    else:
        overrides = dict(model_args.config_overrides or {})
        if model_args.num_align_levels is not None:
            overrides["num_align_levels"] = model_args.num_align_levels
        model, processor = assemble(
            model_args.language_model,
            model_args.vision_tower,
            chat_template=model_args.chat_template,
            dtype=getattr(torch, model_args.dtype),
            seed=config.seed,
            **overrides,
        )
    return _run_stage(AlignGPTPretrainTrainer, model, processor, model_args, data_args, config)


def instruct_command(argv: Sequence[str]) -> dict[str, Any]:
    """`aligngpt instruct`: stage 2. Returns the summary that it writes."""
    model_args, data_args, config = parse_settings(
        "aligngpt instruct",
        (ModelArguments, DataArguments, AlignGPTInstructConfig),
        argv,
        "Stage 2: train language model, projector and gate on conversations, from the output of `aligngpt pretrain`.",
    )
    _check_run(model_args, data_args, config)
    if model_args.model is None:
        raise ValueError("model is missing: give the output folder of `aligngpt pretrain`.")
    model, processor = _load(model_args)
    return _run_stage(AlignGPTInstructTrainer, model, processor, model_args, data_args, config)


def score_command(argv: Sequence[str]) -> Any:
    """`aligngpt score`: CLIP scores and levels for a data set."""
    from .scoring import ScoreConfig, score_dataset

    (config,) = parse_settings(
        "aligngpt score", (ScoreConfig,), argv, "Score image-text pairs with CLIP and cut the scores into levels."
    )
    return score_dataset(config)


def _check_run(model_args: ModelArguments, data_args: DataArguments, config: StageConfig):
    """What can be refused before anything is loaded."""
    if data_args.dataset is None:
        raise ValueError("dataset is missing: a file, a folder or a Hub id.")
    if model_args.dtype not in DTYPES:
        raise ValueError(f"dtype={model_args.dtype!r} is not one of {', '.join(DTYPES)}.")
    if model_args.dtype != "float32" and not config.bf16:
        raise ValueError(f"dtype={model_args.dtype} needs bf16: set bf16 to true, or leave dtype out.")
    if config.eval_strategy != "no" and data_args.eval_dataset is None:
        raise ValueError(f"eval_strategy={config.eval_strategy.value} needs eval_dataset.")
    if config.resume_from_checkpoint is None and find_last_checkpoint(config.output_dir):
        raise ValueError(
            f"{config.output_dir} holds checkpoints of an earlier run: continue it with resume_from_checkpoint=auto, "
            "or choose another output_dir."
        )
    if not torch.cuda.is_available():
        # the loader's hint about pinned memory, which concerns GPUs alone
        warnings.filterwarnings("ignore", message=".*pin_memory.*")


def _load(args: ModelArguments) -> tuple[AlignGPTForConditionalGeneration, AlignGPTProcessor]:
    """Model and processor of a folder or Hub id, with the installed code."""
    path = Path(args.model)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"{args.model} holds no config.json: give a finished model, such as stage 1's output_dir.")
    if not path.is_dir() and (path.is_absolute() or args.model.count("/") != 1 or args.model.startswith((".", "~"))):
        raise ValueError(f"model {args.model!r}: there is no such folder.")
    model, info = AlignGPTForConditionalGeneration.from_pretrained(
        args.model, revision=args.model_revision, dtype=getattr(torch, args.dtype), output_loading_info=True
    )
    if info["missing_keys"]:
        raise ValueError(
            f"{args.model} lacks {len(info['missing_keys'])} weights, which would stay random "
            f"({', '.join(sorted(info['missing_keys'])[:3])}, ...): it is not a complete AlignGPT."
        )
    return model, AlignGPTProcessor.from_pretrained(args.model, revision=args.model_revision)


def _rows(data_args: DataArguments, source: str, split: str | None) -> Dataset:
    return load_rows(
        source,
        split=split,
        name=data_args.dataset_config,
        revision=data_args.dataset_revision,
        image_folder=data_args.image_folder,
        on_bad_row=data_args.on_bad_row,
    )


def _run_stage(
    trainer_class: type[StageTrainer],
    model: AlignGPTForConditionalGeneration,
    processor: AlignGPTProcessor,
    model_args: ModelArguments,
    data_args: DataArguments,
    config: StageConfig,
) -> dict[str, Any]:
    """Trains, saves and reports; the same for both stages."""
    if model_args.attn_implementation is not None:
        model.set_attn_implementation(model_args.attn_implementation)
    rows = _rows(data_args, data_args.dataset, data_args.dataset_split)
    eval_rows = _rows(data_args, data_args.eval_dataset, data_args.eval_split) if data_args.eval_dataset else None
    trainer = trainer_class(model, config, rows, eval_dataset=eval_rows, processing_class=processor)
    sources = {"dataset": data_args.dataset, "dataset_revision": data_args.dataset_revision}
    for name in ("model", "model_revision", "language_model", "vision_tower"):
        sources[name] = getattr(model_args, name, None)
    trainer.train()
    summary = trainer.save_final({"sources": {name: _public_name(v) for name, v in sources.items() if v is not None}})
    if config.should_log:
        print(describe_run(summary, config.output_dir), flush=True)
    return summary


def _public_name(source: str) -> str:
    """A Hub id as it is, of a local path the last part: the summary is published with the model."""
    return Path(source).name if os.path.exists(source) else source


def describe_run(summary: dict[str, Any], output_dir: str) -> str:
    """What a run did, in a few lines."""
    first, last = summary["loss_first"], summary["loss_last"]
    losses = f"loss {first:.3f} -> {last:.3f}" if first is not None else "no loss logged (see logging_steps)"
    cut = f", {summary['train_rows_cut']} cut" if summary.get("train_rows_cut") else ""
    left_out = f", {summary['train_rows_left_out']} left out" if summary.get("train_rows_left_out") else ""
    rows = f"{summary['train_rows']} rows{left_out}{cut}, " if "train_rows" in summary else ""
    return (
        f"{summary['stage']}: {rows}{summary['steps']} steps of {summary['batch_size']}, {losses}, "
        f"{summary['train_seconds']:.0f} s{' (resumed)' if summary['resumed'] else ''}\n"
        f"trained {summary['trained_parameters']:,} of {summary['parameters']:,} parameters, "
        f'align_mode "{summary["align_mode"]}"; saved to {output_dir}'
    )
