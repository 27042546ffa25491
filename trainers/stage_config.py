"""Settings that both training stages share, on top of TRL's."""

import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from trl import SFTConfig

from .collator import ON_OVERLONG
from .sampling import GROUPINGS


IMAGE_ASPECT_RATIOS = ("square", "pad")


# Settings with the values that they may have: (least, whether that itself, most).
BOUNDS = {
    "learning_rate": (0, True, 1e3),
    "projector_learning_rate": (0, True, 1e3),
    "align_learning_rate": (0, True, 1e3),
    "weight_decay": (0, True, 1e3),
    "max_grad_norm": (0, True, math.inf),
    "adam_beta1": (0, True, 1 - 1e-12),
    "adam_beta2": (0, True, 1 - 1e-12),
    "adam_epsilon": (0, False, 1.0),
    "num_train_epochs": (0, False, 1e6),
    "warmup_steps": (0, True, 1e12),
    "per_device_train_batch_size": (1, True, 1e6),
    "per_device_eval_batch_size": (1, True, 1e6),
    "gradient_accumulation_steps": (1, True, 1e6),
    "save_steps": (0, False, 1e12),
    "logging_steps": (0, False, 1e12),
    "save_total_limit": (1, True, 1e6),
    "max_length": (1, True, 1e9),
    "dataloader_num_workers": (0, True, 1e4),
    "seed": (0, True, 2**32 - 1),
    "data_seed": (0, True, 2**32 - 1),
}


def check_bounds(config: Any) -> None:
    """A ValueError for a number that no run can have."""
    for name, (least, itself, most) in BOUNDS.items():
        value = getattr(config, name, None)
        if value is None:
            continue
        if not isinstance(value, (int, float)) or math.isnan(value):
            raise ValueError(f"{name}={value!r} is not a number.")
        if (
            value > most
            or value < least
            or (value == least and not itself)
            or (math.isinf(value) and name != "max_grad_norm")
        ):
            rule = f"{'at least' if itself else 'more than'} {least}" + (
                "" if math.isinf(most) else f" and at most {most:g}"
            )
            raise ValueError(f"{name}={value} cannot be: it must be {rule}.")
    steps = getattr(config, "max_steps", -1)
    if steps != -1 and steps < 1:
        raise ValueError(f"max_steps={steps} cannot be: it must be at least 1, or -1 for whole epochs.")


def settle_and_check(config: Any) -> None:
    """
    What every trainer's settings have in common: numbers within `BOUNDS`, bfloat16 where a GPU has it, no push.

    Raises:
        ValueError: for a number that no run can have, or `push_to_hub`.
    """
    check_bounds(config)
    if config.bf16 is None:
        on_gpu = not (config.fp16 or config.use_cpu) and torch.cuda.is_available()
        config.bf16 = on_gpu and torch.cuda.is_bf16_supported()
    if config.push_to_hub:
        raise ValueError(
            "push_to_hub would upload training_args.bin, a pickle with paths of this machine: leave it out and run "
            "`aligngpt publish` on the finished model, which checks what leaves."
        )


@dataclass
class StageConfig(SFTConfig):
    """
    Settings of both stages on top of TRL's [`SFTConfig`]; the defaults are the paper's (section 4.1).

    Args:
        image_aspect_ratio (`str`): `"square"` resizes and crops images, `"pad"` pads them to a square first. The
            choice is saved with the processor.
        on_overlong (`str`): what happens to rows longer than `max_length`: `"error"`, `"drop"` (left out, counted) or
            `"truncate"` (the end of the answer is cut; rows that would lose the whole answer or image tokens are left
            out; both counted).
        check_rows (`bool`): read all texts, not the images, before the first step, so that a bad row stops the run
            at its start and not hours later. `"drop"` and `"truncate"` need it. A streamed data set is checked on the
            way instead.
        group_by (`str`): which rows share a batch: `"none"` (drawn at random), `"length"` (rows of similar length) or
            `"modality_length"` (besides, rows with images apart from rows without). Needs `check_rows`, which
            measures the rows.
        pack_rows (`bool`): the language model sees the rows of a batch one behind the other, without padding, each with
            its own positions and attention; losses are the same. Tried on a small copy at the start: families that
            cannot keep rows apart are refused. Not with `torch_compile`.
        projector_learning_rate (`float`, *optional*): the projector's own peak learning rate.
        eval_generations (`int`): held-out rows answered by generation at each evaluation; answers go to
            `generations.jsonl` in `output_dir`, the share of exact answers and the gate's mean weights to the log.
        eval_generation_tokens (`int`): most tokens of such an answer.
        resume_from_checkpoint (`str`, *optional*): a checkpoint folder, or `"auto"`: the last complete one in
            `output_dir`, or a fresh start when there is none.
        resume (`str`, *optional*): a shorter name of `resume_from_checkpoint`.
        overwrite (`bool`): replace an earlier run or a finished model in `output_dir`, which is refused otherwise.
        checkpoint_digests (`bool`): take the digest of every file of a checkpoint, however large, so that flipped bits
            in weights are found, too (80 GB take minutes); files up to 64 MB have one always.
        use_kernels (`bool`): replace layers by kernels from the Hub (package `kernels`).

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
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave NaN and infinity out of logged losses. Training stops at them anyway."}
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
    group_by: str = field(
        default="none",
        metadata={"help": "Rows of a batch: `none` (random), `length` or `modality_length`.", "choices": GROUPINGS},
    )
    pack_rows: bool = field(
        default=False,
        metadata={"help": "Run the language model without padding: rows one behind the other."},
    )
    projector_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of the projector, where it is to differ."}
    )
    eval_generations: int = field(
        default=0, metadata={"help": "Held-out rows answered by generation at each evaluation, logged with the gate."}
    )
    eval_generation_tokens: int = field(default=64, metadata={"help": "Most tokens of such an answer."})
    resume: str | None = field(
        default=None, metadata={"help": "Same as resume_from_checkpoint: a checkpoint folder, or `auto`."}
    )
    overwrite: bool = field(
        default=False, metadata={"help": "Replace an earlier run or a finished model in output_dir."}
    )
    checkpoint_digests: bool = field(
        default=False, metadata={"help": "Take the digest of large checkpoint files too, and compare it on resuming."}
    )
    use_kernels: bool = field(
        default=False, metadata={"help": "Replace layers by kernels from the Hub (needs the package `kernels`)."}
    )

    def __post_init__(self):
        settle_and_check(self)
        choices = {"image_aspect_ratio": IMAGE_ASPECT_RATIOS, "on_overlong": ON_OVERLONG, "group_by": GROUPINGS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}.")
        for name, only in (("assistant_only_loss", True), ("packing", False), ("padding_free", False)):
            if getattr(self, name) != only:
                more = "" if name == "assistant_only_loss" else " (pack_rows leaves out padding)"
                raise ValueError(f"{name}={getattr(self, name)} has no effect here: leave it at {only}{more}.")
        if self.pack_rows and self.torch_compile:
            raise ValueError("pack_rows makes batches of other shapes at each step: leave out torch_compile.")
        if self.enable_jit_checkpoint:
            raise ValueError(
                "enable_jit_checkpoint has no effect here: a signal (SIGTERM or SIGINT) always finishes the step, "
                "saves a checkpoint and stops."
            )
        if self.on_overlong != "error" and not self.check_rows:
            raise ValueError(
                f"on_overlong={self.on_overlong!r} needs check_rows=True, which finds and counts the rows."
            )
        if self.train_sampling_strategy != "random" and self.group_by != "none":
            raise ValueError(
                f"train_sampling_strategy={self.train_sampling_strategy!r} and group_by={self.group_by!r} both choose "
                "the batches: set group_by to none, or leave train_sampling_strategy out."
            )
        for name in ("eval_generations", "eval_generation_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative.")
        if self.resume is not None:
            if self.resume_from_checkpoint not in (None, self.resume):
                raise ValueError(
                    f"resume={self.resume!r} and resume_from_checkpoint={self.resume_from_checkpoint!r} are the same "
                    "setting: give one of them."
                )
            self.resume_from_checkpoint = self.resume
        with warnings.catch_warnings():
            # TRL 1.16 sets the old name itself
            warnings.filterwarnings("ignore", message="`gradient_checkpointing` is deprecated", category=FutureWarning)
            super().__post_init__()
