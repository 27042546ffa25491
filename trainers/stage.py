"""What both training stages share: settings, the freeze, resuming and saving (see `StageTrainer`)."""

import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from transformers import ProcessorMixin
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor

from .collator import ON_OVERLONG, AlignGPTDataCollator
from .rows import ENCODED_FEATURES, prepare_rows


logger = logging.get_logger(__name__)

SUMMARY_NAME = "training_summary.json"
IMAGE_ASPECT_RATIOS = ("square", "pad")


@dataclass
class StageConfig(SFTConfig):
    """
    Settings of both stages on top of TRL's [`SFTConfig`]; the defaults are the paper's (section 4.1).

    Args:
        image_aspect_ratio (`str`): `"square"` resizes and crops pictures, `"pad"` pads them to a square first. The
            choice is saved with the processor.
        on_overlong (`str`): what happens to rows longer than `max_length`: `"error"`, `"drop"` (left out, counted) or
            `"truncate"` (the end of the answer is cut; rows that would lose the whole answer or image tokens are left
            out; both counted).
        check_rows (`bool`): read all texts, not the pictures, before the first step, so that a bad row stops the run
            at its start and not hours later. `"drop"` and `"truncate"` need it. A streamed data set is checked on the
            way instead.
        resume_from_checkpoint (`str`, *optional*): a checkpoint folder, or `"auto"`: the last complete one in
            `output_dir`, or a fresh start when there is none.

    Raises:
        ValueError: for a value outside these, or a setting of TRL that cannot have an effect here.
    """

    max_length: int | None = field(
        default=2048,
        metadata={"help": "Most tokens of a row, image tokens included. Longer rows: see `on_overlong`."},
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule."})
    warmup_steps: float = field(
        default=0.03, metadata={"help": "Warm-up: a share of all steps when below 1, else a number of steps."}
    )
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of AdamW."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the data."})
    save_total_limit: int | None = field(
        default=1, metadata={"help": "Checkpoints to keep; each is a full model with optimizer state."}
    )
    bf16: bool | None = field(
        default=None, metadata={"help": "bfloat16 mixed precision. Default: on where a GPU supports it."}
    )
    assistant_only_loss: bool = field(
        default=True, metadata={"help": "Always on: only answers are supervised, in both stages."}
    )
    image_aspect_ratio: str = field(
        default="pad",
        metadata={"help": "`square`: resize and crop. `pad`: pad to a square first.", "choices": IMAGE_ASPECT_RATIOS},
    )
    on_overlong: str = field(
        default="error",
        metadata={"help": "Rows longer than `max_length`: `error`, `drop` or `truncate`.", "choices": ON_OVERLONG},
    )
    check_rows: bool = field(
        default=True, metadata={"help": "Read all texts before the first step, so that a bad row stops the run there."}
    )

    def __post_init__(self):
        if self.bf16 is None:
            self.bf16 = not (self.fp16 or self.use_cpu) and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        for name, allowed in (("image_aspect_ratio", IMAGE_ASPECT_RATIOS), ("on_overlong", ON_OVERLONG)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}.")
        for name, only in (("assistant_only_loss", True), ("packing", False), ("padding_free", False)):
            if getattr(self, name) != only:
                raise ValueError(f"{name}={getattr(self, name)} has no effect here: leave it at {only}.")
        if self.on_overlong != "error" and not self.check_rows:
            raise ValueError(
                f"on_overlong={self.on_overlong!r} needs check_rows=True, which finds and counts the rows."
            )
        with warnings.catch_warnings():
            # TRL 1.16 sets the old name itself
            warnings.filterwarnings("ignore", message="`gradient_checkpointing` is deprecated", category=FutureWarning)
            super().__post_init__()


class StageTrainer(SFTTrainer):
    """
    [`SFTTrainer`] for one stage of AlignGPT. Subclasses name `stage` and say what trains (`configure_stage`,
    `trainable_modules`). Overridden, and why:

    - `__init__`: loads a path with our own classes, hands in the collator and checked rows, then freezes (after
      `super().__init__`, so that nothing there undoes it).
    - `_set_signature_columns_if_needed`: TRL would strip `align_level` and the names of rows.
    - `train`: resumes from the last *complete* checkpoint when asked for `"auto"`, and measures the run.
    - `create_model_card`: TRL's card shows a text-generation pipeline, which cannot run this model; cards are made from
      `training_summary.json` when a model is published.

    Args:
        model (`str` or `AlignGPTForConditionalGeneration`): folder or Hub id, or the model itself.
        args (`StageConfig`): settings.
        train_dataset (`Dataset` or `IterableDataset`): rows `images`, `messages`, in stage 1 `align_level`.
        eval_dataset (*optional*): the same, or a dict of such.
        processing_class (`AlignGPTProcessor`, *optional*): loaded from the model's folder when `None`.
    """

    stage: ClassVar[str]
    _tag_names = ["aligngpt", "trl", "sft"]
    _name = "AlignGPT"
    _paper = {"title": "AlignGPT: Multi-modal Large Language Models with Adaptive Alignment Capability"}

    def __init__(
        self,
        model: str | os.PathLike | AlignGPTForConditionalGeneration,
        args: StageConfig,
        train_dataset: Dataset | IterableDataset,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset] | None = None,
        processing_class: ProcessorMixin | None = None,
        **kwargs,
    ):
        if isinstance(model, (str, os.PathLike)):
            processing_class = processing_class or AlignGPTProcessor.from_pretrained(model)
            model = AlignGPTForConditionalGeneration.from_pretrained(
                model, **{"dtype": torch.float32, **(args.model_init_kwargs or {})}
            )
            args.model_init_kwargs = None
        if processing_class is None:
            raise ValueError("processing_class is missing: pass the AlignGPTProcessor that belongs to the model.")
        processing_class.validate_with(model.config)
        self.configure_stage(model, args)
        model.config.training_stage = self.stage
        processing_class.image_processor.do_pad = args.image_aspect_ratio == "pad"
        if processing_class.tokenizer.pad_token is None:
            processing_class.tokenizer.pad_token = processing_class.tokenizer.eos_token
        collator = AlignGPTDataCollator(
            processing_class,
            stage=self.stage,
            max_length=args.max_length,
            on_overlong=args.on_overlong,
            num_align_levels=model.config.num_align_levels,
            gate_context=model.config.gate_context,
            pad_to_multiple_of=args.pad_to_multiple_of,
        )
        self.row_counts: dict[str, int] = {}

        def prepare(rows: Dataset | IterableDataset, name: str) -> Dataset | IterableDataset:
            rows, counts = prepare_rows(rows, collator, args, name)
            self.row_counts |= counts
            return rows

        train_dataset = prepare(train_dataset, "train")
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: prepare(rows, name) for name, rows in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = prepare(eval_dataset, "eval")
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self._freeze()

    # ---- what a stage is ----

    def configure_stage(self, model: AlignGPTForConditionalGeneration, args: StageConfig):
        """Checks that the model fits the stage and sets what its config says from now on."""
        raise NotImplementedError

    def trainable_modules(self, model: AlignGPTForConditionalGeneration) -> list[torch.nn.Module]:
        """The modules whose parameters this stage trains; all others are frozen."""
        raise NotImplementedError

    def _freeze(self):
        if is_peft_model(self.model):
            return  # an adapter's own selection of what trains stands
        self.model.requires_grad_(False)
        for module in self.trainable_modules(self.model):
            for parameter in module.parameters():
                parameter.requires_grad_(True)
                # a low-precision copy would swallow small updates; the frozen rest may stay as it was loaded
                parameter.data = parameter.data.float()

    def trained_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            self._signature_columns = ["images", "messages", "align_level", "id", *ENCODED_FEATURES]

    # ---- running and saving ----

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint
        if resume_from_checkpoint in ("auto", "true", "True", True):
            resume_from_checkpoint = find_last_checkpoint(self.args.output_dir)
        self.resumed_from = resume_from_checkpoint or None
        started = time.perf_counter()
        try:
            output = super().train(resume_from_checkpoint=self.resumed_from, **kwargs)
        except BaseException:
            self._close_progress_bar()
            raise
        self.train_seconds = time.perf_counter() - started
        return output

    def _close_progress_bar(self):
        """So that an error stands on a line of its own, below the bar."""
        for callback in self.callback_handler.callbacks:
            bar = getattr(callback, "training_bar", None)
            if bar is not None:
                bar.close()

    def create_model_card(self, *args: Any, **kwargs: Any):
        """Nothing: see the class."""

    def summary(self) -> dict[str, Any]:
        """What the run did, in plain values: counts, losses, time and the settings that made it."""
        curve = [[log["step"], log["loss"]] for log in self.state.log_history if "loss" in log]
        evals = [log for log in self.state.log_history if any(key.startswith("eval_") for key in log)]
        config = self.model.config
        return {
            "stage": self.stage,
            "align_mode": config.align_mode,
            "gate_context": config.gate_context,
            "num_align_levels": config.num_align_levels,
            **self.row_counts,
            "steps": self.state.global_step,
            "epochs": self.state.epoch,
            "batch_size": self.args.train_batch_size
            * self.args.gradient_accumulation_steps
            * self.accelerator.num_processes,
            "trained_parameters": self.trained_parameters(),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "loss_first": curve[0][1] if curve else None,
            "loss_last": curve[-1][1] if curve else None,
            "loss_curve": curve,
            "eval": evals,
            "train_seconds": round(getattr(self, "train_seconds", 0.0), 2),
            "resumed": getattr(self, "resumed_from", None) is not None,
            "learning_rate": self.args.learning_rate,
            "seed": self.args.seed,
            "max_length": self.args.max_length,
            "image_aspect_ratio": self.args.image_aspect_ratio,
            "versions": {"torch": torch.__version__, **_versions("transformers", "trl", "datasets", "accelerate")},
        }

    def save_final(self, extra: dict[str, Any] | None = None) -> dict[str, Any]:
        """
        Saves model, processor, code and `training_summary.json` to `output_dir`, ready for the Hub.

        Everything is written beside and moved at the end, the summary last: a folder with a summary is complete.
        """
        output_dir = Path(self.args.output_dir)
        beside = output_dir / "unfinished"
        if self.args.should_save:
            shutil.rmtree(beside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.save_model(str(beside))
        self.save_state()
        summary = {**self.summary(), **(extra or {})}
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            # a pickle with this machine's paths; the summary holds what matters of it
            (beside / "training_args.bin").unlink(missing_ok=True)
            lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in summary.items())
            (beside / SUMMARY_NAME).write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
            (output_dir / SUMMARY_NAME).unlink(missing_ok=True)
            for stale in _model_files(output_dir):
                stale.unlink()
            for path in sorted(beside.iterdir(), key=lambda path: path.name == SUMMARY_NAME):
                if path.is_dir():
                    shutil.rmtree(output_dir / path.name, ignore_errors=True)
                os.replace(path, output_dir / path.name)
            beside.rmdir()
        self.accelerator.wait_for_everyone()
        return summary


def find_last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The newest complete checkpoint in a folder, or `None`. `trainer_state.json` is what a save writes last."""
    complete = []
    for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)
        if match and path.is_dir():
            if (path / "trainer_state.json").exists():
                complete.append((int(match[1]), str(path)))
            else:
                logger.warning(f"{path.name} is incomplete (the run stopped while saving): passed over.")
    return max(complete)[1] if complete else None


def _model_files(folder: Path) -> Iterable[Path]:
    """Weights of an earlier run, which could outlive a new save with another number of shards."""
    return [path for pattern in ("*.safetensors", "*.safetensors.index.json") for path in folder.glob(pattern)]


def _versions(*packages: str) -> dict[str, str]:
    from importlib.metadata import version

    return {package: version(package) for package in packages}
