"""Tuning by rewards with GRPO (arXiv 2402.03300): a model after stage 2 learns from its own answers."""

from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor

from ..dummy_image import add_dummy_images
from ..stage_config import settle_and_check
from ..supervised_head import gather_head
from .dpo_trainer import train_as_stage_2


@dataclass
class AlignGPTGRPOConfig(GRPOConfig):
    """Settings of [`AlignGPTGRPOTrainer`]: TRL's [`GRPOConfig`]. Not in the paper."""

    bf16: bool | None = field(
        default=None, metadata={"help": "bfloat16 mixed precision. Default: on where a GPU supports it."}
    )

    def __post_init__(self):
        settle_and_check(self)
        super().__post_init__()


class AlignGPTGRPOTrainer(GRPOTrainer):
    """
    [`GRPOTrainer`] for AlignGPT. It trains what stage 2 trains, and the gate reads the prompt alone, as it does when
    the answers are made: else the probabilities of its own answers come out wrong. Rows have `prompt` (one user
    turn) and `images`, as TRL's for vision models, and may have `align_level`, which takes the gate's place while
    answers are made and while they are scored. Overridden of TRL's:

    - `__init__`: checks, then freezes, and shows the gate the prompt.
    - `_get_per_token_logps_and_entropies`: TRL hands it all that the processor gives, and knows no `prompt_mask`, which
      is of the prompts alone; the labels tell where those end.
    - `_generate_and_score_completions`, `_generate_single_turn`: TRL knows no levels. Its batches carry them as
      `token_type_ids` (level + 1), which it splits and shuffles with the rows; the model gets them as `align_level`.

    Args:
        model: an [`AlignGPTForConditionalGeneration`] after stage 2.
        reward_funcs: see GRPOTrainer.
        args: the settings.
        train_dataset: rows `prompt`, `images`, what the rewards read, and `align_level` in all of them or in none.
        processing_class: the model's [`AlignGPTProcessor`].
        kwargs: of GRPOTrainer, such as `peft_config`.

    Raises:
        ValueError: processor and model do not fit, the model has not been through stage 2, a prompt holds answers, or a
            level is not the model's.
    """

    _tag_names = ["aligngpt", "trl", "grpo"]

    def __init__(
        self,
        model: AlignGPTForConditionalGeneration,
        reward_funcs: Any,
        args: AlignGPTGRPOConfig,
        train_dataset: Dataset,
        processing_class: AlignGPTProcessor | None = None,
        **kwargs,
    ):
        if processing_class is None:
            raise ValueError("processing_class is missing: pass the AlignGPTProcessor that belongs to the model.")
        processing_class.validate_with(model.config)
        if model.config.training_stage == "pretrain":
            raise ValueError("This model has been through stage 1 alone: run `aligngpt instruct` first.")
        for number, prompt in enumerate(train_dataset["prompt"] if isinstance(train_dataset, Dataset) else ()):
            if not isinstance(prompt, str) and any(turn["role"] == "assistant" for turn in prompt):
                raise ValueError(f"Row {number}: its prompt holds an answer; prompts are of one user turn.")
        if isinstance(train_dataset, Dataset) and "align_level" in train_dataset.column_names:
            _check_levels(train_dataset["align_level"][:], model.config.num_align_levels, args)
        # of the rows that are being answered
        self._levels: torch.Tensor | None = None
        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        base = self.model.get_base_model() if is_peft_model(self.model) else self.model
        if not is_peft_model(self.model):
            train_as_stage_2(self.model)
        gather_head(base)
        add_dummy_images(base)
        for each in (base, self.ref_model):
            if each is not None:
                each.register_forward_pre_hook(_show_the_prompt, with_kwargs=True)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        levels = [row.get("align_level") for row in inputs]
        if levels[0] is None:
            return super()._generate_and_score_completions(inputs)
        self._levels = torch.tensor(levels, device=self.accelerator.device)
        try:
            output = super()._generate_and_score_completions(inputs)
            output["token_type_ids"] = self._levels[:, None] + 1
        finally:
            self._levels = None
        return output

    def _generate_single_turn(self, prompt_ids: list, images: Any, multimodal_fields: dict, *args: Any, **kwargs: Any):
        if self._levels is not None:
            multimodal_fields = {**multimodal_fields, "align_level": self._levels}
        return super()._generate_single_turn(prompt_ids, images, multimodal_fields, *args, **kwargs)

    def _get_per_token_logps_and_entropies(self, *args: Any, prompt_mask: torch.Tensor | None = None, **kwargs: Any):
        if self._levels is not None:
            kwargs["token_type_ids"] = self._levels[:, None] + 1
        return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any):
        """Does nothing: `aligngpt publish` writes the card."""


def _show_the_prompt(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """What TRL cannot hand over where it scores answers: the labels limit the gate to the prompt, and rows' levels."""
    if (levels := kwargs.pop("token_type_ids", None)) is not None:
        kwargs["align_level"] = levels[:, 0] - 1
    labels = kwargs.get("labels")
    if labels is not None and kwargs.get("prompt_mask") is None:
        kwargs["prompt_mask"] = (labels == -100) & kwargs["attention_mask"].bool()
    return args, kwargs


def _check_levels(levels: list[int | None], num_align_levels: int, args: GRPOConfig) -> None:
    for row, level in enumerate(levels):
        if level is None or not 0 <= level < num_align_levels:
            allowed = f"the model has 0 to {num_align_levels - 1}, in all rows or in none"
            raise ValueError(f"Row {row}: align_level is {level!r}; {allowed}.")
    if args.use_vllm or args.use_transformers_continuous_batching:
        raise ValueError(
            "Rows have align_level, which reaches the model's own generate alone: leave use_vllm and "
            "use_transformers_continuous_batching out, or the column."
        )
