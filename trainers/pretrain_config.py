"""Settings of stage 1, alignment-level-aware pre-training."""

import math
from dataclasses import dataclass, field

from .stage_config import IMAGE_ASPECT_RATIOS, StageConfig


@dataclass
class AlignGPTPretrainConfig(StageConfig):
    """
    Settings of [`AlignGPTPretrainTrainer`]: those of [`StageConfig`] and TRL's [`SFTConfig`], with the paper's values
    for stage 1 as defaults (learning rate 1e-3; 8 images x 4 accumulation steps on each of 8 GPUs; images resized
    and cropped).

    Args:
        align_learning_rate (`float`, *optional*): the level table's own peak learning rate. A row of the table learns
            from the pairs of its level alone, so with few of them it stays near where it started. Not in the paper;
            `None` takes `learning_rate`.
        image_token_penalty (`float`): weight of a term that keeps image tokens as long as the language model's words:
            the mean squared logarithm of their length over that of a word. A high learning rate makes them many
            times as long, and the words next to them less often right. Not in the paper; 0 leaves it out.
    """

    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of AdamW."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Rows of one step on each device."})
    gradient_accumulation_steps: int = field(
        default=4, metadata={"help": "Steps whose gradients are added up before one update."}
    )
    image_aspect_ratio: str = field(
        default="square",
        metadata={"help": "`square`: resize and crop. `pad`: pad to a square first.", "choices": IMAGE_ASPECT_RATIOS},
    )
    align_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of the level table, where it is to differ."}
    )
    image_token_penalty: float = field(
        default=0.0,
        metadata={"help": "Weight of a term that keeps image tokens as long as words; not in the paper. 0: none."},
    )

    def __post_init__(self):
        if not 0 <= self.image_token_penalty < math.inf:
            raise ValueError(f"image_token_penalty={self.image_token_penalty} cannot be: it must be at least 0.")
        super().__post_init__()
