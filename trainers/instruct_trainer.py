"""
Stage 2, adaptive alignment instruction tuning (paper, section 3.3): language model, projector and gate learn from
conversations.

Overridden of TRL's SFTTrainer beyond the list in [`StageTrainer`]:

- `create_optimizer`: gives the projector its own learning rate.
"""

import torch

from modeling_aligngpt import AlignGPTForConditionalGeneration

from .instruct_config import AlignGPTInstructConfig
from .stage import StageTrainer


# The modes whose alignment vector comes from the gate; in the others the gate is frozen, having no gradient.
GATED_MODES = ("gate", "local", "random")


class AlignGPTInstructTrainer(StageTrainer):
    """
    Trains language model (with its head), projector and gate; level table and vision tower are frozen. The model leaves
    with the `align_mode` of the settings and `training_stage="instruct"`.

    Raises:
        ValueError: when the model has not been through stage 1 and `allow_unaligned` is not set.

    Example:
        ```python
        trainer = AlignGPTInstructTrainer("stage1", AlignGPTInstructConfig("stage2"), rows)
        trainer.train()
        trainer.save_final()
        ```
    """

    stage = "instruct"

    def configure_stage(self, model: AlignGPTForConditionalGeneration, args: AlignGPTInstructConfig):
        config = model.config
        if config.training_stage is None and not args.allow_unaligned:
            raise ValueError(
                "This model has not been through stage 1: its projector and alignment levels are random. Run "
                "`aligngpt pretrain` and give its output folder as `model`, or set allow_unaligned to train it anyway."
            )
        level = args.default_align_level
        if level is not None and not 0 <= level < config.num_align_levels:
            raise ValueError(f"default_align_level={level} is not in 0..{config.num_align_levels - 1}, the model's.")
        config.align_mode = args.align_mode
        config.default_align_level = level
        config.gate_context = args.gate_context
        if args.align_mode == "random" and config.training_stage != "instruct":
            # drawn on the CPU, so that every process has the same table
            generator = torch.Generator().manual_seed(args.seed)
            table = model.model.align_embeddings.weight
            drawn = torch.randn(table.shape, generator=generator) * config.get_text_config().initializer_range
            table.data.copy_(drawn)

    def trainable_modules(self, model: AlignGPTForConditionalGeneration) -> list[torch.nn.Module]:
        modules = [model.model.language_model, model.lm_head, model.model.multi_modal_projector]
        if model.config.align_mode in GATED_MODES:
            modules.append(model.model.align_gate)
        return modules

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        learning_rate = self.args.projector_learning_rate
        if learning_rate is None or not fresh:
            return optimizer
        named = (self.model if model is None else model).named_parameters()
        projector = {id(parameter) for name, parameter in named if "multi_modal_projector" in name}
        for group in list(optimizer.param_groups):
            own = [parameter for parameter in group["params"] if id(parameter) in projector]
            if own:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in projector]
                optimizer.add_param_group({**group, "params": own, "lr": learning_rate})
        return optimizer
