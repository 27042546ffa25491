"""
Stage 1, alignment-level-aware pre-training (paper, section 3.2): projector and level embeddings learn from pairs.

What is overridden of TRL's SFTTrainer stands in [`StageTrainer`]; this stage adds nothing to the list.
"""

from typing import Any

import torch

from modeling_aligngpt import AlignGPTForConditionalGeneration

from .pretrain_config import AlignGPTPretrainConfig
from .stage import StageTrainer


class AlignGPTPretrainTrainer(StageTrainer):
    """
    Trains projector and level table; language model and vision tower are frozen. Each row's `align_level` says which
    row of the table stands behind BOS. The model leaves with `align_mode="level"` and `training_stage="pretrain"`.

    Example:
        ```python
        trainer = AlignGPTPretrainTrainer(model, AlignGPTPretrainConfig("stage1"), rows, processing_class=processor)
        trainer.train()
        trainer.save_final()
        ```
    """

    stage = "pretrain"

    def configure_stage(self, model: AlignGPTForConditionalGeneration, args: AlignGPTPretrainConfig):
        model.config.align_mode = "level"

    def check_adapter(self, peft_config: Any, args: AlignGPTPretrainConfig):
        if peft_config is not None:
            raise ValueError(
                "peft_config has no effect in stage 1, where projector and level embeddings train and the language "
                "model does not: leave it out, and give it to stage 2."
            )

    def trainable_modules(self, model: AlignGPTForConditionalGeneration) -> list[torch.nn.Module]:
        return [model.model.multi_modal_projector, model.model.align_embeddings]
