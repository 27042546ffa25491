"""
Stage 2, adaptive alignment instruction tuning (paper, section 3.3): language model, projector and gate learn from
conversations.

What is overridden of TRL's SFTTrainer stands in [`StageTrainer`]; this stage adds nothing to the list.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers.integrations import is_deepspeed_zero3_enabled

from aligngpt_shared.records import GATE_BEFORE
from modeling_aligngpt import AlignGPTForConditionalGeneration

from .instruct_config import AlignGPTInstructConfig
from .stage import StageTrainer


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
    gate_before: dict[str, torch.Tensor] | None = None

    def configure_stage(self, model: AlignGPTForConditionalGeneration, args: AlignGPTInstructConfig):
        config = model.config
        if config.training_stage is None and not args.allow_unaligned:
            raise ValueError(
                "This model has not been through stage 1: its projector and alignment levels are random. Run "
                "`aligngpt pretrain` and give its output folder as `model`, or set allow_unaligned to train it anyway."
            )
        if not is_deepspeed_zero3_enabled():  # there each process has a part of it
            self.gate_before = {
                k: v.detach().clone().contiguous() for k, v in model.model.align_gate.state_dict().items()
            }
        level = args.default_align_level
        if level is not None and not 0 <= level < config.num_align_levels:
            raise ValueError(f"default_align_level={level} is not in 0..{config.num_align_levels - 1}, the model's.")
        config.align_mode = args.align_mode
        config.default_align_level = level
        # a model after stage 2 goes on reading as it did
        goes_on = config.training_stage == "instruct" and config.gate_context == "sequence"
        config.gate_context = args.gate_context or ("sequence" if goes_on else "first_turn")
        if config.uses_gate and config.gate_context == "first_turn" and not config.answer_openings:
            raise ValueError(
                "The chat template writes nothing between a question and its answer, so the gate cannot tell where the "
                'answer begins: use another template, or gate_context="sequence".'
            )
        if args.align_mode == "random" and config.training_stage != "instruct":
            # drawn on the CPU, so that every process has the same table
            generator = torch.Generator().manual_seed(args.seed)
            table = model.model.align_embeddings.weight
            table.data.copy_(torch.nn.init.xavier_uniform_(torch.empty(table.shape), generator=generator))

    def trainable_modules(self, model: AlignGPTForConditionalGeneration) -> list[torch.nn.Module]:
        # in the other modes the gate has no gradient
        modules = [model.model.language_model, model.lm_head, model.model.multi_modal_projector]
        if model.config.uses_gate:
            modules.append(model.model.align_gate)
        return modules

    def save_beside(self, folder: Path):
        """The gate as it was before this stage: what `aligngpt levels` compares with."""
        if self.gate_before and self.uses_gate():
            save_file(self.gate_before, folder / GATE_BEFORE)

    def uses_gate(self) -> bool:
        return self.model.config.uses_gate

    def check_adapter(self, peft_config: Any, args: AlignGPTInstructConfig):
        if peft_config is None:
            return
        whole = set(getattr(peft_config, "modules_to_save", None) or ())
        missing = [name for name in ("multi_modal_projector", "align_gate") if name not in whole]
        if missing:
            raise ValueError(
                f"peft_config.modules_to_save lacks {' and '.join(missing)}, which stage 2 trains whole: add it."
            )
        if args.align_mode == "random" and "align_embeddings" not in whole:
            raise ValueError(
                'align_mode="random" draws the level table afresh, and an adapter would not hold it: train without an '
                "adapter, or add align_embeddings to peft_config.modules_to_save."
            )
