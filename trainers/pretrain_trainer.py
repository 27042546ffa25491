"""
Stage 1, alignment-level-aware pre-training (paper, section 3.2): projector and level embeddings learn from pairs.

What is overridden of TRL's SFTTrainer stands in [`StageTrainer`]; this stage adds nothing to the list.
"""

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

    def trainable_modules(self, model: AlignGPTForConditionalGeneration) -> list[torch.nn.Module]:
        return [model.model.multi_modal_projector, model.model.align_embeddings]
