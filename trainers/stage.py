"""What both training stages share: settings, checks of the rows, the freeze, resuming and saving (see `StageTrainer`)."""

import json
import os
import re
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from transformers import ProcessorMixin
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor

from .collator import (
    ON_OVERLONG,
    ROW_INDEX_COLUMN,
    SUPERVISED_COLUMN,
    TOKENS_COLUMN,
    AlignGPTDataCollator,
    describe_row,
    overlong_message,
)


logger = logging.get_logger(__name__)

SUMMARY_NAME = "training_summary.json"
IMAGE_ASPECT_RATIOS = ("square", "pad")
ENCODED_FEATURES = datasets.Features(
    {
        ROW_INDEX_COLUMN: datasets.Value("int64"),
        TOKENS_COLUMN: datasets.List(datasets.Value("int32")),
        SUPERVISED_COLUMN: datasets.List(datasets.Value("bool")),
        "length": datasets.Value("int32"),
        "needed": datasets.Value("int32"),
    }
)


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
            raise ValueError(f"on_overlong={self.on_overlong!r} needs check_rows=True, which finds and counts the rows.")
        super().__post_init__()


class StageTrainer(SFTTrainer):
    """
    [`SFTTrainer`] for one stage of AlignGPT. Subclasses name `stage` and say what trains (`configure_stage`,
    `trainable_modules`). Overridden, and why:

    - `__init__`: loads a path with our own classes, hands in the collator, checks the rows, then freezes. Freezing comes
      after `super().__init__` so that it holds for a path and for an instance.
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
        train_dataset = self._prepare_rows(train_dataset, collator, args, "train")
        if isinstance(eval_dataset, dict):
            eval_dataset = {
                name: self._prepare_rows(rows, collator, args, name) for name, rows in eval_dataset.items()
            }
        elif eval_dataset is not None:
            eval_dataset = self._prepare_rows(eval_dataset, collator, args, "eval")
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

    # ---- rows ----

    def _prepare_rows(
        self, rows: Dataset | IterableDataset, collator: AlignGPTDataCollator, args: StageConfig, name: str
    ) -> Dataset | IterableDataset:
        """Rows with encoded pictures and names; over-long ones handled, all texts checked."""
        if not isinstance(rows, (Dataset, IterableDataset)):
            raise ValueError(
                f"The {name} data is a {type(rows).__name__}: make it a `datasets.Dataset` "
                "(`Dataset.from_list`, or `load_rows` of aligngpt_trainers)."
            )
        columns = rows.column_names or list(next(iter(rows)))
        if "messages" not in columns:
            raise ValueError(f"The {name} data has no `messages` column but {', '.join(columns)}: use `load_rows`.")
        streamed = isinstance(rows, IterableDataset)
        if not streamed and len(rows) == 0:
            raise ValueError(f"The {name} data is empty.")
        if "images" not in columns:
            rows = rows.map(lambda row: {"images": []}) if streamed else rows.add_column("images", [[]] * len(rows))
        # encoded pictures are opened in the collator, where an error can name the row
        images = (rows.features or {}).get("images")
        if isinstance(getattr(images, "feature", None), datasets.Image):
            rows = rows.cast_column("images", datasets.List(datasets.Image(decode=False)))
        if streamed:
            if "id" not in columns:
                rows = rows.map(lambda row, index: {ROW_INDEX_COLUMN: index}, with_indices=True)
            if args.on_overlong != "error" and args.max_length is not None:
                which = 1 if args.on_overlong == "truncate" else 0
                rows = rows.filter(lambda row: collator.measure(*collator.encode([row]))[which] <= args.max_length)
            return rows
        if args.check_rows:
            return self._check_all(rows, collator, args, name)
        return rows.add_column(ROW_INDEX_COLUMN, list(range(len(rows)))) if rows._indices is None else rows

    def _check_all(self, rows: Dataset, collator: AlignGPTDataCollator, args: StageConfig, name: str) -> Dataset:
        """Encodes every text once: raises at the first bad row, leaves out what `on_overlong` says."""
        needs_level = self.stage == "pretrain"
        texts = rows.select_columns([column for column in ("messages", "align_level", "id") if column in rows.column_names])

        def encode(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
            chunk = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
            chunk = [{ROW_INDEX_COLUMN: index, **row} for index, row in zip(indices, chunk, strict=True)]
            if needs_level:
                for row in chunk:
                    collator.check_level(row)
            encoded = collator.encode(chunk)
            measured = [collator.measure(row) for row in encoded]
            if args.on_overlong == "error" and args.max_length is not None:
                for row, (length, _) in zip(chunk, measured, strict=True):
                    if length > args.max_length:
                        raise ValueError(overlong_message(describe_row(row), length, args.max_length))
            columns = {key: [row[key] for row in encoded] for key in (TOKENS_COLUMN, SUPERVISED_COLUMN)}
            return {ROW_INDEX_COLUMN: indices, **columns, "length": [m[0] for m in measured], "needed": [m[1] for m in measured]}

        encoded = texts.map(
            encode,
            batched=True,
            with_indices=True,
            remove_columns=texts.column_names,
            num_proc=args.dataset_num_proc,
            features=ENCODED_FEATURES,
            desc=f"Reading the {name} texts",
        )
        lengths, needed = np.array(encoded["length"]), np.array(encoded["needed"])
        limit = np.inf if args.max_length is None else args.max_length
        kept = (needed if args.on_overlong == "truncate" else lengths) <= limit
        cut, left_out = int((kept & (lengths > limit)).sum()), int((~kept).sum())
        self.row_counts.update({f"{name}_rows": int(kept.sum()), f"{name}_longest_row": int(lengths.max())})
        if cut or left_out:
            self.row_counts.update({f"{name}_rows_cut": cut, f"{name}_rows_left_out": left_out})
            logger.warning(
                f"{name} data: {left_out} of {len(rows)} rows left out and {cut} cut, because they are longer than "
                f"max_length={args.max_length} (the longest has {lengths.max()} tokens)."
            )
        if not kept.any():
            raise ValueError(f"No row of the {name} data fits into max_length={args.max_length}: raise it.")
        if rows._indices is None:  # beside a selection, columns could only be put by copying all pictures
            clash = [column for column in encoded.column_names if column in rows.column_names]
            encoded = encoded.remove_columns(["length", "needed"])
            rows = datasets.concatenate_datasets([rows.remove_columns(clash), encoded], axis=1)
        return rows.select(np.flatnonzero(kept)) if left_out else rows

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
        output = super().train(resume_from_checkpoint=self.resumed_from, **kwargs)
        self.train_seconds = time.perf_counter() - started
        return output

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
