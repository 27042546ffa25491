"""Preference tuning by DPO (arXiv 2305.18290): a model after stage 2 learns which of two answers is preferred."""

from copy import deepcopy
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor

from ..dummy_image import add_dummy_images
from ..supervised_head import gather_head
from .dpo_config import AlignGPTDPOConfig


class AlignGPTPreferenceCollator(DataCollatorForVisionPreference):
    """TRL's, with what the gate may read (`prompt_mask`: nothing of the answers) and with levels of rows."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        # TRL changes its rows
        rows = [dict(example) for example in examples]
        levels = [row.pop("align_level", None) for row in rows]
        batch = super().torch_call(rows)
        prompt = batch["attention_mask"] * (1 - batch["completion_mask"])
        if (read := batch.get("prompt_mask")) is not None:
            # of the prompts alone, padded on the left; the batch is flushed to the left
            lengths = prompt.sum(1)
            aligned = torch.zeros_like(prompt)
            for row, length in enumerate(lengths.tolist()):
                aligned[row, :length] = read[row, read.shape[1] - length :]
            prompt = prompt * aligned
        batch["prompt_mask"] = prompt
        if None not in levels:
            batch["align_level"] = torch.tensor(levels * 2)  # chosen, then rejected
        return batch


def train_as_stage_2(model: AlignGPTForConditionalGeneration) -> None:
    """Unfreezes what stage 2 trains, in float32: language model, head, projector, gate where it decides."""
    model.requires_grad_(False)
    trained = [model.model.language_model, model.lm_head, model.model.multi_modal_projector]
    for module in [*trained, *([model.model.align_gate] if model.config.uses_gate else [])]:
        module.requires_grad_(True)
        for parameter in module.parameters():
            parameter.data = parameter.data.float()


class AlignGPTDPOTrainer(DPOTrainer):
    """
    [`DPOTrainer`] for AlignGPT. It trains what stage 2 trains (language model with its head, projector, gate where it
    decides); the gate reads the prompt alone, so both answers of a row have one alignment vector. Overridden of TRL's:

    - `__init__`: hands in the collator and a copy of the model as reference, then freezes.
    - `_set_signature_columns_if_needed`: TRL would strip `align_level`.

    Args:
        model: an [`AlignGPTForConditionalGeneration`] after stage 2.
        args: the settings.
        train_dataset, eval_dataset: rows of [`~pairs.load_preferences`].
        processing_class: the model's [`AlignGPTProcessor`].
        kwargs: of DPOTrainer, such as `peft_config`.

    Raises:
        ValueError: processor and model do not fit, or the model has not been through stage 2.
    """

    _tag_names = ["aligngpt", "trl", "dpo"]

    def __init__(
        self,
        model: AlignGPTForConditionalGeneration,
        args: AlignGPTDPOConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        processing_class: AlignGPTProcessor | None = None,
        **kwargs,
    ):
        if processing_class is None:
            raise ValueError("processing_class is missing: pass the AlignGPTProcessor that belongs to the model.")
        processing_class.validate_with(model.config)
        if model.config.training_stage == "pretrain":
            raise ValueError("This model has been through stage 1 alone: run `aligngpt instruct` first.")
        if kwargs.get("peft_config") is None and kwargs.get("ref_model") is None:
            kwargs["ref_model"] = deepcopy(model).requires_grad_(False).eval()
        collator = AlignGPTPreferenceCollator(processor=processing_class, max_length=args.max_length)
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        base = self.model.get_base_model() if is_peft_model(self.model) else self.model
        if not is_peft_model(self.model):
            train_as_stage_2(self.model)
        gather_head(base)
        add_dummy_images(base)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if "align_level" not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, "align_level"]

    def create_model_card(self, *args: Any, **kwargs: Any):
        """Does nothing: `aligngpt publish` writes the card."""
