"""Settings of stage 1, alignment-level-aware pre-training."""

from dataclasses import dataclass, field

from .stage_config import IMAGE_ASPECT_RATIOS, StageConfig


@dataclass
class AlignGPTPretrainConfig(StageConfig):
    """
    Settings of [`AlignGPTPretrainTrainer`]: those of [`StageConfig`] and TRL's [`SFTConfig`], with the paper's values
    for stage 1 as defaults (learning rate 1e-3; 8 images x 4 accumulation steps on each of 8 GPUs; images resized
    and cropped).
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
