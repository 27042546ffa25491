"""Settings of stage 2, adaptive alignment instruction tuning."""

from dataclasses import dataclass, field

from .sampling import GROUPINGS
from .stage_config import StageConfig


INSTRUCT_ALIGN_MODES = ("gate", "local", "global", "mean", "fixed", "random", "level")


@dataclass
class AlignGPTInstructConfig(StageConfig):
    """
    Settings of [`AlignGPTInstructTrainer`]: those of [`StageConfig`] and TRL's [`SFTConfig`], with the paper's values
    for stage 2 as defaults (learning rate 2e-5; 16 rows on each of 8 GPUs; images padded to a square; batches of one
    modality and similar length).

    Args:
        align_mode (`str`): what the alignment vector is. `"gate"` is the method (mix of the local levels plus the top
            level); the paper's ablations: `"local"`, `"global"` and `"mean"` (see [`AlignGPTConfig`]). Ours: `"fixed"`
            (the row `default_align_level`), `"random"` (as `"gate"`, with the table of stage 1 drawn afresh) and
            `"level"`: each row's own `align_level` (see `aligngpt score`), for instruction data whose answers fit their
            images to different degrees; the top level is asked for in use.
        default_align_level (`int`, *optional*): 0-based level of `"fixed"`; the top one when `None`.
        gate_context (`str`, *optional*): what the gate reads (see [`AlignGPTConfig`]): `"first_turn"`, the same in
            training and in use, or `"sequence"`, answers too, as in the authors' code. `None` is `"first_turn"` for a
            model from stage 1, and what it was trained with for one from stage 2.
        allow_unaligned (`bool`): train a model that has not been through stage 1.

    Raises:
        ValueError: for a value outside these, or a level without `align_mode="fixed"`.
    """

    learning_rate: float = field(default=2e-5, metadata={"help": "Peak learning rate of AdamW."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Rows of one step on each device."})
    align_mode: str = field(
        default="gate",
        metadata={
            "help": "Alignment vector: `gate` (the method), an ablation, or each row's own `level`.",
            "choices": INSTRUCT_ALIGN_MODES,
        },
    )
    default_align_level: int | None = field(
        default=None, metadata={"help": "0-based level of align_mode `fixed`; the top one when not given."}
    )
    gate_context: str | None = field(
        default=None,
        metadata={
            "help": "The gate reads the `first_turn` (default after stage 1), or answers, too, as in the authors' code "
            "(`sequence`).",
            "choices": ("first_turn", "sequence"),
        },
    )
    group_by: str = field(
        default="modality_length",
        metadata={"help": "Rows of a batch: `none` (random), `length` or `modality_length`.", "choices": GROUPINGS},
    )
    allow_unaligned: bool = field(
        default=False, metadata={"help": "Train a model that has not been through stage 1 (`aligngpt pretrain`)."}
    )

    def __post_init__(self):
        if self.align_mode not in INSTRUCT_ALIGN_MODES:
            raise ValueError(f"align_mode={self.align_mode!r} is not one of {', '.join(INSTRUCT_ALIGN_MODES)}.")
        if self.default_align_level is not None and self.align_mode != "fixed":
            raise ValueError(
                f"default_align_level={self.default_align_level} has no effect with align_mode={self.align_mode!r}: "
                'leave it out, or set align_mode to "fixed".'
            )
        super().__post_init__()
