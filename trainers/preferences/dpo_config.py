"""Settings of preference tuning by DPO."""

from dataclasses import dataclass, field

from trl import DPOConfig

from ..stage_config import settle_and_check


@dataclass
class AlignGPTDPOConfig(DPOConfig):
    """
    Settings of [`AlignGPTDPOTrainer`]: TRL's [`DPOConfig`], with a rate and a length for models of this family. Not
    in the paper.
    """

    learning_rate: float = field(default=5e-7, metadata={"help": "Peak learning rate of AdamW."})
    max_length: int | None = field(default=2048, metadata={"help": "Most tokens of a row, image tokens included."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule."})
    warmup_steps: float = field(
        default=0.03, metadata={"help": "Warm-up: a share of all steps when below 1, else a number of steps."}
    )
    bf16: bool | None = field(
        default=None, metadata={"help": "bfloat16 mixed precision. Default: on where a GPU supports it."}
    )

    def __post_init__(self):
        settle_and_check(self)
        super().__post_init__()
