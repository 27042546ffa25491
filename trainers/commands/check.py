"""
`aligngpt check`: tries a stage's settings, model, rows, tokens, images and memory without training.

    aligngpt check --config pretrain.yaml

takes the YAML and the settings of `aligngpt pretrain` or `aligngpt instruct`, builds what they build, looks at the
first batches and prints what it found; the exit status is 1 when something would stop training.
"""

import argparse
import logging as python_logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, IterableDataset

from aligngpt_shared.files import write_json
from aligngpt_shared.printing import printable
from modeling_aligngpt import AlignGPTConfig

from ..data.layout import layout_of
from ..first_batch import batch_facts, check_batch, mark_supervised
from ..memory import count_parameters, memory_of
from ..rows import LENGTH_COLUMN
from .check_measures import (
    batch_names,
    first_batches,
    first_loss,
    image_facts,
    level_counts,
    longest_batch,
    step_facts,
    step_seconds,
    token_facts,
)
from .check_report import describe_check
from .flags import with_known_flags
from .settings import read_yaml


if TYPE_CHECKING:
    from ..stage import StageTrainer
    from .train import StageRun

PROG = "aligngpt check"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROG,
        allow_abbrev=False,
        description="Try a stage without training: tokens, images, levels, an example, memory, steps. Takes all "
        "settings of `aligngpt pretrain` or `aligngpt instruct` (see their --help) besides these.",
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="Settings in YAML; the command line overrides them.")
    parser.add_argument("--stage", choices=("pretrain", "instruct"), help="Default: recognised from the model.")
    parser.add_argument(
        "--images", default="200", metavar="N|all", help="Rows whose images are decoded (default: 200)."
    )
    parser.add_argument("--batches", type=int, default=3, help="First batches to look at (default: 3).")
    parser.add_argument("--devices", type=int, default=1, help="Devices to count steps for (default: 1).")
    parser.add_argument("--json", metavar="FILE", help="Write what was found there, too.")
    parser.add_argument(
        "--no_model",
        action="store_true",
        help="Read no weights: everything but the loss and the activations, for huge models.",
    )
    return parser


def check_command(argv: Sequence[str]) -> int:
    """
    `aligngpt check`. Returns 1 when it found something that would stop training, else 0.

    Raises:
        ValueError: for settings that cannot be read.
    """
    parser = _parser()
    parser.error = _refuse
    own, words = parser.parse_known_args(with_known_flags(argv, parser))
    words = ["--config", own.config, *words] if own.config is not None else words
    number = None if own.images == "all" else own.images
    if number is not None and not (number.isdigit()):
        raise ValueError(f"--images {own.images}: a number of rows, or `all`.")
    for name, least in (("batches", 1), ("devices", 1)):
        if getattr(own, name) < least:
            raise ValueError(f"--{name} {getattr(own, name)}: at least {least}.")
    report = check_stage(
        own.stage or recognise_stage(words),
        words,
        num_images=None if number is None else int(number),
        num_batches=own.batches,
        num_devices=own.devices,
        light=own.no_model,
    )
    print(printable(describe_check(report)), flush=True)
    if own.json is not None:
        write_json(own.json, report, indent=1)
    return 1 if report["problems"] else 0


def _refuse(message: str):
    raise ValueError(f"{message}. `{PROG} --help` lists the settings.")


def recognise_stage(words: Sequence[str]) -> str:
    """
    The stage that settings are meant for: the first where a model is assembled, else the one after the model's own.

    Raises:
        ValueError: where that does not decide it.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("config", "model", "model_name_or_path", "model_revision", "vision_tower", "language_model"):
        parser.add_argument(f"--{name}")
    given, _ = parser.parse_known_args(with_known_flags(words, parser))
    settings: dict[str, Any] = {} if given.config is None else read_yaml(given.config)
    settings |= {name: value for name, value in vars(given).items() if value is not None}
    if settings.get("language_model") or settings.get("vision_tower"):
        return "pretrain"
    model = settings.get("model") or settings.get("model_name_or_path")
    if model is None:
        raise ValueError("Neither model nor language_model and vision_tower are given: what is to be trained?")
    try:
        trained = AlignGPTConfig.from_pretrained(model, revision=settings.get("model_revision"))
    except Exception as error:
        raise ValueError(f"model {model!r}: its config cannot be read ({error}).") from error
    if trained.training_stage == "instruct":
        raise ValueError(f"{model} has been through both stages: say which is meant with --stage.")
    return "instruct" if trained.training_stage == "pretrain" else "pretrain"


def check_stage(
    stage: str,
    words: Sequence[str],
    *,
    num_images: int | None = 200,
    num_batches: int = 3,
    num_devices: int = 1,
    light: bool = False,
) -> dict[str, Any]:
    """
    What `aligngpt check` finds, as plain values.

    Args:
        stage: `"pretrain"` or `"instruct"`.
        words: what would stand behind the stage's command.
        num_images: rows whose images are decoded; all, when `None`.
        num_batches: first batches to look at.
        num_devices: devices that steps are counted for.
        light: read no weights; without the loss and the activations.

    Returns:
        Facts by name (`tokens`, `batches`, `images`, `levels`, `parameters`, `steps`, `memory`, `example`,
        `first_loss`), those that could be found; `problems` that would stop training, and `warnings`.

    Raises:
        ValueError: for settings that cannot be read.
    """
    from ..checkpoints import check_output, checkpoint_to_continue
    from .train import STAGES, check_places, parse_settings

    # settings for GPUs can be tried where there is none, such as on a login node
    without_gpu = not torch.cuda.is_available() and not any("use_cpu" in word.replace("-", "_") for word in words)
    words = [*words, *(("--use_cpu", "true") if without_gpu else ())]
    model_args, data_args, config = parse_settings(f"{PROG} ({stage})", STAGES[stage][1], words)
    sources = model_args.model or f"{getattr(model_args, 'language_model', None)} + {model_args.vision_tower}"
    report: dict[str, Any] = {"stage": stage, "model": sources, "dataset": data_args.dataset}
    report |= {"problems": [], "warnings": []}
    try:
        check_places(model_args, data_args, config)
        check_output(config, checkpoint_to_continue(config.resume_from_checkpoint, config.output_dir), remove=False)
    except (ValueError, OSError) as error:
        report["problems"].append(str(error))
    # rows that are too long are counted here, where training would stop at the first
    counted = config.on_overlong == "error" and config.check_rows and not data_args.streaming
    fresh_folder = not os.path.isdir(config.output_dir)
    with _Warnings(report["warnings"]):
        try:
            if data_args.dataset:
                report["layout"] = layout_of(
                    data_args.dataset,
                    split=data_args.dataset_split,
                    name=data_args.dataset_config,
                    revision=data_args.dataset_revision,
                    columns=data_args.columns,
                    streaming=data_args.streaming,
                )
            run = _build(stage, [*words, "--on_overlong", "drop"] if counted else words, light)
        except (ValueError, OSError, ImportError) as error:
            report["problems"].append(str(error))
            return report
        finally:
            if fresh_folder and os.path.isdir(config.output_dir) and not os.listdir(config.output_dir):
                os.rmdir(config.output_dir)
        _measure_rows(run.trainer, report, num_images, counted)
        _measure_batches(run.trainer, report, num_batches, light)
        report["parameters"] = count_parameters(run.trainer.model)
        rows = run.trainer.train_dataset
        report["steps"] = step_facts(config, len(rows) if isinstance(rows, Dataset) else None, num_devices)
    return report


def _build(stage: str, words: Sequence[str], light: bool) -> "StageRun":
    if light:
        from .check_light import build_light

        return build_light(stage, words, PROG)
    from .train import build_stage

    return build_stage(stage, words, prog=PROG, will_train=False)


class _Warnings(python_logging.Handler):
    """Collects this project's warnings, so that they stand in the report."""

    SOURCES = ("aligngpt_trainers", "modeling_aligngpt")

    def __init__(self, found: list[str]):
        super().__init__(python_logging.WARNING)
        self.found = found

    def emit(self, record: python_logging.LogRecord):
        message = record.getMessage()
        if message not in self.found:
            self.found.append(message)

    def __enter__(self):
        for name in self.SOURCES:
            python_logging.getLogger(name).addHandler(self)

    def __exit__(self, *_):
        for name in self.SOURCES:
            python_logging.getLogger(name).removeHandler(self)


def _measure_rows(trainer: "StageTrainer", report: dict[str, Any], num_images: int | None, counted: bool) -> None:
    rows, args = trainer.train_dataset, trainer.args
    if isinstance(rows, IterableDataset):
        report["warnings"].append("The rows are streamed: only those of the first batches were looked at.")
        return
    counts = trainer.row_counts
    if LENGTH_COLUMN in rows.column_names:
        report["tokens"] = token_facts(rows, trainer.data_collator.processor.image_seq_length, args.max_length)
        report["tokens"]["longest"] = counts["train_longest_row"]
    report["rows"] = {
        name: counts.get(f"train_{key}", 0)
        for name, key in (("kept", "rows"), ("cut", "rows_cut"), ("left_out", "rows_left_out"))
    }
    too_long = report["rows"]["left_out"] - counts.get("train_rows_unusable", 0)
    if counted and too_long:
        report["problems"].append(
            f"{too_long} of {too_long + counts['train_rows']} rows are longer than max_length={args.max_length} (the "
            f'longest has {counts["train_longest_row"]} tokens), and on_overlong is "error": raise max_length, or set '
            'on_overlong to "drop" or "truncate".'
        )
    if trainer.stage == "pretrain" and "align_level" in rows.column_names:
        report["levels"] = level_counts(rows, trainer.model.config.num_align_levels)
        empty = [str(level) for level, count in enumerate(report["levels"]) if not count]
        if empty:
            report["warnings"].append(f"No row has level {', '.join(empty)}: nothing will be learned for it.")
    report["images"] = found = image_facts(rows, num_images)
    if found["unreadable"]:
        listed = "\n  ".join(found["first_unreadable"])
        report["problems"].append(
            f"{found['unreadable']} of {found['unreadable'] + found['decoded']} images cannot be read:\n  {listed}\n"
            'Repair or remove them, or leave such rows out with on_bad_row="skip".'
        )


def _measure_batches(trainer: "StageTrainer", report: dict[str, Any], number: int, light: bool) -> None:
    collator = trainer.data_collator
    first = None
    try:
        for batch in first_batches(trainer, number):
            report.setdefault("batches", []).append(batch_facts(batch, collator.processor.image_token_id))
            names = batch_names(trainer, batch)
            check_batch(batch, names, collator)
            if first is None:
                first = batch
                text = mark_supervised(batch["input_ids"][0], batch["labels"][0], batch["attention_mask"][0], collator)
                report["example"] = {"name": names[0], "text": text}
        if first is None:
            raise ValueError("There is no whole batch to train on: take a smaller batch, or more rows.")
        if not light:
            report["first_loss"] = loss = first_loss(trainer, first)
            if not torch.isfinite(torch.tensor(loss)):
                raise ValueError(f"The loss of the first batch is {loss}.")
            report["step_seconds"] = step_seconds(trainer, first)
        longest = longest_batch(trainer, first)
        rows, length = longest["input_ids"].shape
        report["memory"] = {"rows": rows, "length": length, **memory_of(trainer, None if light else longest)}
    except (ValueError, ArithmeticError) as error:
        report["problems"].append(str(error))
