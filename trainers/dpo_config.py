"""Settings of preference tuning by DPO."""

from dataclasses import dataclass, field

from trl import DPOConfig

from .stage_config import check_bounds


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
        import torch

        check_bounds(self)
        if self.bf16 is None:
            self.bf16 = not (self.fp16 or self.use_cpu) and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        if self.push_to_hub:
            raise ValueError(
                "push_to_hub would upload training_args.bin, a pickle with paths of this machine: leave it out and run "
                "`aligngpt publish` on the finished model, which checks what leaves."
            )
        super().__post_init__()
