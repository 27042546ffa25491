"""
Outputs of AlignGPT: transformers' own, so that a field that a release renames (the cache, in 5.24) is renamed here too.

B rows, T positions, I images of the whole batch, S positions an image, D hidden size, N alignment levels.
"""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


@dataclass
class AlignGPTModelOutputWithPast(BaseModelOutputWithPast):
    """
    Outputs of [`AlignGPTModel`]: those of the language model, and

    Args:
        image_hidden_states (`torch.FloatTensor` of shape `(I, S, D)`, *optional*): projected images.
        align_weights (`torch.FloatTensor` of shape `(B, N)`, *optional*): what each level contributes to the row's
            alignment vector: the gate's shares and 1 for the top level, or one-hot for a level given by hand; zeros
            for a row without an image. `None` behind a cache, where no vector is made.
    """

    image_hidden_states: torch.Tensor | None = None
    align_weights: torch.Tensor | None = None


@dataclass
class AlignGPTCausalLMOutputWithPast(CausalLMOutputWithPast):
    """
    Outputs of [`AlignGPTForConditionalGeneration`]: those of a causal language model (`loss`, `logits`
    `(B, T, vocab_size)`, the cache, `hidden_states` and `attentions` layer by layer), and

    Args:
        image_hidden_states (`torch.FloatTensor` of shape `(I, S, D)`, *optional*): projected images.
        align_weights (`torch.FloatTensor` of shape `(B, N)`, *optional*): see [`AlignGPTModelOutputWithPast`].
    """

    image_hidden_states: torch.Tensor | None = None
    align_weights: torch.Tensor | None = None


__all__ = ["AlignGPTCausalLMOutputWithPast", "AlignGPTModelOutputWithPast"]
