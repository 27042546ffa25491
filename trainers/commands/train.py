"""What the commands `aligngpt pretrain` and `aligngpt instruct` do."""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import patch_environment
from datasets import Dataset, IterableDataset
from transformers.integrations import is_deepspeed_zero3_enabled

from aligngpt_shared.records import ALIGNMENT, SUMMARY
from aligngpt_shared.references import is_hub_id
from modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor
from modeling_aligngpt.assembly import assemble

from ..checkpoints import check_output, checkpoint_to_continue
from ..data.load import load_rows
from ..instruct_config import AlignGPTInstructConfig
from ..instruct_trainer import AlignGPTInstructTrainer
from ..lora import ADAPTER_CONFIG, check_lora, lora_config, quantization_config, settle_adapter
from ..pretrain_config import AlignGPTPretrainConfig
from ..pretrain_trainer import AlignGPTPretrainTrainer
from ..stage import StageConfig, StageTrainer
from ..storage.folders import at_revision, find_record
from .arguments import DTYPES, DataArguments, ModelArguments, PretrainModelArguments
from .extras import check_loggers
from .init import checked_overrides
from .settings import check_settings, parse_settings


STAGES = {
    "pretrain": (
        AlignGPTPretrainTrainer,
        (PretrainModelArguments, DataArguments, AlignGPTPretrainConfig),
        "Stage 1: train projector and level embeddings on pairs with an `align_level` (see `aligngpt score`).",
    ),
    "instruct": (
        AlignGPTInstructTrainer,
        (ModelArguments, DataArguments, AlignGPTInstructConfig),
        "Stage 2: train language model, projector and gate on conversations, from the output of `aligngpt pretrain`.",
    ),
}


@dataclass
class StageRun:
    """A stage that is ready to run.

    Attributes:
        trainer: the trainer, with its model, processor and rows; not yet trained.
        config: its settings.
        model_args: which model it was told to train.
        data_args: which rows.
        extra: what the summary says beside what the trainer knows: `sources`, and where they exist `pretrain` (the
            summary of stage 1) and `alignment` (how the levels were made).
    """

    trainer: StageTrainer
    config: StageConfig
    model_args: ModelArguments
    data_args: DataArguments
    extra: dict[str, Any]

    def run(self) -> dict[str, Any]:
        """Trains, saves and reports; returns the summary."""
        self.trainer.train()
        summary = self.trainer.save_final(self.extra)
        if self.config.should_log:
            print(describe_run(summary, self.config.output_dir), flush=True)
        return summary


def pretrain_command(argv: Sequence[str]) -> dict[str, Any]:
    """`aligngpt pretrain`: stage 1. Returns the summary that it writes."""
    return build_stage("pretrain", argv).run()


def instruct_command(argv: Sequence[str]) -> dict[str, Any]:
    """`aligngpt instruct`: stage 2. Returns the summary that it writes."""
    return build_stage("instruct", argv).run()


def check_words(stage: str, argv: Sequence[str]) -> None:
    """Refuses settings that do not exist, without making any; see [`check_settings`]."""
    _, kinds, description = STAGES[stage]
    check_settings(f"aligngpt {stage}", kinds, argv, description)


def build_stage(stage: str, argv: Sequence[str], *, prog: str | None = None, will_train: bool = True) -> StageRun:
    """
    Everything of a stage up to its first step.

    Args:
        stage: `"pretrain"` or `"instruct"`.
        argv: the words behind the command: `--config FILE.yaml` and overrides.
        prog: name of the command in help and errors; `aligngpt <stage>` when `None`.
        will_train: refuse an `output_dir` that holds an earlier run's checkpoints.

    Raises:
        ValueError: unusable settings, model or rows.
    """
    trainer_class, kinds, description = STAGES[stage]
    model_args, data_args, config = parse_settings(prog or f"aligngpt {stage}", kinds, argv, description)
    _check_run(stage, model_args, data_args, config)
    if will_train:
        check_places(model_args, data_args, config)
        # before anything is loaded; once more when training begins, under the lock
        check_output(config, checkpoint_to_continue(config.resume_from_checkpoint, config.output_dir), remove=False)
    if _is_fresh(stage, model_args):
        model, processor = _assemble(model_args, config)
    else:
        model, processor = _load(model_args, config)
    if model_args.attn_implementation is not None:
        model.set_attn_implementation(model_args.attn_implementation)
    streaming = {"streaming": True, "shuffle_buffer": data_args.shuffle_buffer, "seed": config.seed}
    options = {"shared": config.world_size > 1}
    rows = rows_of(
        data_args,
        data_args.dataset,
        data_args.dataset_split,
        **options,
        **(streaming if data_args.streaming else {}),
    )
    eval_rows = None
    if data_args.eval_dataset:
        eval_rows = rows_of(data_args, data_args.eval_dataset, data_args.eval_split, **options)
    adapter = lora_config(model_args, model)
    trainer = trainer_class(
        model, config, rows, eval_dataset=eval_rows, processing_class=processor, peft_config=adapter
    )
    if adapter is not None:
        settle_adapter(trainer.model)
    return StageRun(trainer, config, model_args, data_args, run_records(stage, model_args, data_args))


def _check_run(stage: str, model_args: ModelArguments, data_args: DataArguments, config: StageConfig):
    """What can be refused before anything is loaded."""
    check_lora(model_args, stage)
    check_loggers(config.report_to)
    if data_args.dataset is None:
        raise ValueError("dataset is missing: a file, a folder or a Hub id.")
    if model_args.dtype not in DTYPES:
        raise ValueError(f"dtype={model_args.dtype!r} is not one of {', '.join(DTYPES)}.")
    if model_args.dtype != "float32" and not config.bf16:
        raise ValueError(f"dtype={model_args.dtype} needs bf16: set bf16 to true, or leave dtype out.")
    if data_args.streaming and config.max_steps <= 0:
        raise ValueError("streaming needs max_steps: a stream does not say how many rows it has.")
    if config.eval_strategy != "no" and data_args.eval_dataset is None:
        raise ValueError(f"eval_strategy={config.eval_strategy.value} needs eval_dataset.")
    if not torch.cuda.is_available():
        # the loader's hint about pinned memory, which concerns GPUs alone
        warnings.filterwarnings("ignore", message=".*pin_memory.*")


def check_places(model_args: ModelArguments, data_args: DataArguments, config: StageConfig) -> None:
    """Raises a ValueError where a run would write over what it reads."""
    output = Path(config.output_dir)
    sources = {name: getattr(model_args, name, None) for name in ("model", "language_model", "vision_tower")}
    sources |= {"dataset": data_args.dataset, "eval_dataset": data_args.eval_dataset}
    for name, source in sources.items():
        if source is not None and output.exists() and os.path.exists(source) and os.path.samefile(source, output):
            raise ValueError(f"output_dir {config.output_dir} is {name} itself: choose another folder to write.")


def _is_fresh(stage: str, args: ModelArguments) -> bool:
    """Whether a model is to be assembled; refuses contradictory or missing settings."""
    if stage == "instruct":
        if args.model is None:
            raise ValueError("model is missing: give the output folder of `aligngpt pretrain`.")
        return False
    parts = ("language_model", "vision_tower")
    if args.model is None:
        if missing := [name for name in parts if getattr(args, name) is None]:
            raise ValueError(
                f"{' and '.join(missing)} missing: give language_model and vision_tower (a fresh model is assembled "
                "from them), or model (an AlignGPT)."
            )
        return True
    revisions = [f"{name}_revision" for name in parts]
    fresh_only = (*parts, *revisions, "chat_template", "num_align_levels", "config_overrides")
    if given := [name for name in fresh_only if getattr(args, name) is not None]:
        raise ValueError(f"{', '.join(given)} has no effect on a finished model: leave it out, or leave `model` out.")
    return False


def _assemble(
    args: PretrainModelArguments, config: StageConfig
) -> tuple[AlignGPTForConditionalGeneration, AlignGPTProcessor]:
    overrides = checked_overrides(args.config_overrides)
    if args.num_align_levels is not None:
        overrides["num_align_levels"] = args.num_align_levels
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "ZeRO-3 splits weights while a checkpoint is read, so a fresh model cannot be assembled under it: run "
            "`aligngpt init` once and give its folder as model, or use zero2 for stage 1."
        )
    # every process reads the weights: the fresh rows and levels are drawn after the old ones
    with patch_environment(FSDP_CPU_RAM_EFFICIENT_LOADING="false"):
        return assemble(
            at_revision(args.language_model, args.language_model_revision, "language_model"),
            at_revision(args.vision_tower, args.vision_tower_revision, "vision_tower"),
            chat_template=args.chat_template,
            dtype=getattr(torch, args.dtype),
            seed=config.seed,
            **overrides,
        )


def _load(args: ModelArguments, config: StageConfig) -> tuple[AlignGPTForConditionalGeneration, AlignGPTProcessor]:
    """Model and processor of a folder or Hub id, with the installed code."""
    path = Path(args.model)
    if (path / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"{args.model} holds an adapter: make a whole model of it with `aligngpt merge --adapter {args.model} "
            "--output DIR`, and give that."
        )
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"{args.model} holds no config.json: give a finished model, such as stage 1's output_dir.")
    if not path.is_dir() and not is_hub_id(args.model):
        raise ValueError(f"model {args.model!r}: there is no such folder.")
    model, info = AlignGPTForConditionalGeneration.from_pretrained(
        args.model,
        revision=args.model_revision,
        dtype=getattr(torch, args.dtype),
        quantization_config=quantization_config(args, config.bf16),
        output_loading_info=True,
    )
    if info["missing_keys"]:
        raise ValueError(
            f"{args.model} lacks {len(info['missing_keys'])} weights, which would stay random "
            f"({', '.join(sorted(info['missing_keys'])[:3])}, ...): it is not a complete AlignGPT."
        )
    return model, AlignGPTProcessor.from_pretrained(args.model, revision=args.model_revision)


def rows_of(data_args: DataArguments, source: str, split: str | None, **options: Any) -> Dataset | IterableDataset:
    return load_rows(
        source,
        split=split,
        name=data_args.dataset_config,
        revision=data_args.dataset_revision,
        image_folder=data_args.image_folder,
        columns=data_args.columns,
        on_bad_row=data_args.on_bad_row,
        **options,
    )


# What a model's summary says of the scores that its levels were cut from; the keys are those of alignment.json.
ALIGNMENT_FACTS = (
    *("method", "quantiles", "num_align_levels", "edges", "counts", "mean_scores"),
    *("scorer", "revision", "sha256", "rows"),
)


def run_records(stage: str, model_args: ModelArguments, data_args: DataArguments) -> dict[str, Any]:
    """What the run started from, and its records."""
    sources = {"dataset": data_args.dataset, "dataset_revision": data_args.dataset_revision}
    for name in ("model", "language_model", "vision_tower"):
        for key in (name, f"{name}_revision"):
            sources[key] = getattr(model_args, key, None)
    records = {"sources": {name: _public_name(value) for name, value in sources.items() if value is not None}}
    if stage == "pretrain":
        alignment = find_record(data_args.dataset, ALIGNMENT, data_args.dataset_revision, "dataset")
        if alignment is not None:
            records["alignment"] = {name: alignment[name] for name in ALIGNMENT_FACTS if name in alignment}
    else:
        earlier = find_record(model_args.model, SUMMARY, model_args.model_revision)
        # a model that has been through stage 2 passes on what it knows of stage 1
        first = earlier if earlier is None or earlier.get("stage") == "pretrain" else earlier.get("pretrain")
        if first is not None:
            records["pretrain"] = first
    return records


def _public_name(source: str) -> str:
    """A Hub id as it is, of a local path the last part: the summary is published with the model."""
    return Path(source).name if os.path.exists(source) else source


def describe_run(summary: dict[str, Any], output_dir: str) -> str:
    """What a run did, in a few lines."""
    first, last = summary["loss_first"], summary["loss_last"]
    losses = f"loss {first:.3f} -> {last:.3f}" if first is not None else "no loss logged (see logging_steps)"
    if len(summary.get("loss_curve") or ()) == 1:
        losses = f"loss {first:.3f} (logged once, see logging_steps)"
    cut = f", {summary['train_rows_cut']} cut" if summary.get("train_rows_cut") else ""
    left_out = f", {summary['train_rows_left_out']} left out" if summary.get("train_rows_left_out") else ""
    rows = f"{summary['train_rows']} rows{left_out}{cut}, " if "train_rows" in summary else ""
    return (
        f"{summary['stage']}: {rows}{summary['steps']} steps of {summary['batch_size']}, {losses}, "
        f"{summary['train_seconds']:.0f} s{' (resumed)' if summary['resumed'] else ''}\n"
        f"trained {summary['trained_parameters']:,} of {summary['parameters']:,} parameters, "
        f'align_mode "{summary["align_mode"]}"; saved to {output_dir}\n'
        + (
            f"Next: aligngpt instruct --model {output_dir} --dataset CONVERSATIONS --output_dir OUT"
            if summary["stage"] == "pretrain"
            else f"Next: aligngpt chat --model {output_dir} --image IMAGE; aligngpt evaluate, aligngpt publish"
        )
    )
