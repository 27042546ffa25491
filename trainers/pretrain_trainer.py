"""
Stage 1, alignment-level-aware pre-training (paper, section 3.2): projector and level embeddings learn from pairs.

What is overridden of TRL's SFTTrainer stands in [`StageTrainer`]; this stage adds `compute_loss` and `log`, for the
term that `image_token_penalty` weighs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
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
    _mean_word_length: torch.Tensor | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        # lengths of image tokens over that of a word, since the last log
        self._scales: list[torch.Tensor] = []
        super().__init__(*args, **kwargs)

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

    # ---- image tokens at the scale of words (`image_token_penalty`) ----

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        weight = self.args.image_token_penalty
        if not weight or not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with self._projected() as image_tokens:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        scale = torch.cat([tokens.flatten(0, -2) for tokens in image_tokens]).float().norm(dim=-1) / self._word_length()
        self._scales.append(scale.detach().mean())
        # a loss that is summed over all answers of a step is not divided by its batches later on
        share = 1 if num_items_in_batch is None else 1 / self.current_gradient_accumulation_steps
        term = weight * share * scale.log().square().mean()
        return (result[0] + term, result[1]) if return_outputs else result + term

    def log(self, logs: dict[str, float], start_time: float | None = None):
        if self._scales and "loss" in logs:
            logs["image_token_scale"] = round(torch.stack(self._scales).mean().item(), 4)
            self._scales.clear()
        super().log(logs, start_time)

    @contextmanager
    def _projected(self) -> Iterator[list[torch.Tensor]]:
        """What the projector gives while the block runs."""
        found: list[torch.Tensor] = []
        model = self.accelerator.unwrap_model(self.model)
        hook = model.model.multi_modal_projector.register_forward_hook(lambda *call: found.append(call[2]))
        try:
            yield found
        finally:
            hook.remove()

    def _word_length(self) -> torch.Tensor:
        """Mean length of the language model's embeddings, which this stage does not change."""
        if self._mean_word_length is None:
            embedding = self.accelerator.unwrap_model(self.model).get_input_embeddings()
            words = embedding.weight.detach()
            # FSDP2 has a share of the table on each device, ZeRO-3 none
            words = words.full_tensor() if hasattr(words, "full_tensor") else words
            if not words.numel():
                raise ValueError("image_token_penalty needs the table of words, which ZeRO-3 takes away: set it to 0.")
            # some families scale what they look up (Gemma)
            scale = torch.as_tensor(getattr(embedding, "embed_scale", 1.0)).to(words.device)
            self._mean_word_length = words.float().norm(dim=-1).mean() * scale
        return self._mean_word_length
