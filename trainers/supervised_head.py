"""Additions to TRL's fused language-model head: supervised positions alone on a CPU, and its weight under FSDP2."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from .collator import IGNORE_INDEX


def gather_head(model: nn.Module) -> None:
    """
    Has FSDP2 bring the head's weight together as it does for any other module, where it is sharded on its own.

    TRL's fused head reads the weight past the module and gathers it itself (`DTensor.full_tensor`), which does not add
    up the gradients: each process would train its part of the head on its own rows alone.

    Args:
        model: with the head, before it is sharded.
    """

    def gather(module: nn.Module, args: tuple, output: Any) -> None:
        # looked up at each call: `fully_shard` changes the module's class later
        if isinstance(head := model.get_output_embeddings(), FSDPModule):
            head.unshard()

    model.base_model.register_forward_hook(gather)


class SupervisedHead:
    """
    Hands TRL's fused head (`add_fused_lm_head` in trl/trainer/utils.py, TRL 1.16) only the positions whose next token
    is supervised. With Triton (a GPU) it leaves out the others itself; elsewhere it computes them and sets them to
    zero: in stage 1, some 580 of 600 positions.

    Args:
        backbone: the model without its head, whose `last_hidden_state` `(B, T, D)` is cut.
    """

    def __init__(self, backbone: nn.Module):
        self.kept: torch.Tensor | None = None
        backbone.register_forward_hook(self._cut)

    def _cut(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self.kept is not None:
            output.last_hidden_state = output.last_hidden_state[:, :-1][self.kept][None]

    @contextmanager
    def __call__(self, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Within it, the inputs that it gives make the fused head see one row of supervised positions."""
        next_tokens = inputs["labels"][:, 1:]
        self.kept = next_tokens != IGNORE_INDEX
        try:
            yield {**inputs, "shift_labels": next_tokens[self.kept][None]}
        finally:
            self.kept = None
