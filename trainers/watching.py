"""What a run logs of this model beside TRL's figures: the loss of each level, the gate's weights, the padding."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .collator import IGNORE_INDEX


SHORT_ANSWER = 8
"""Most supervised tokens an answer of a row with short answers has: a word or two, and the end of the turn."""
ANSWER_KINDS = ("short", "long")
HEAD_POSITIONS = 1024
"""Positions whose logits are made at once."""


class RunWatch:
    """
    Sums over the batches since the last log, on the device, and only read when a log is written.

    Args:
        model: an `AlignGPTForConditionalGeneration`, not wrapped. Its `model`'s outputs are read, so it must be made
            before anything cuts them (`SupervisedHead`).
        levels: whether losses are told apart by the rows' own levels, which takes the head a second time, without
            gradient, over the supervised positions.
        gate: whether the gate decides.
        device: of the sums.
    """

    def __init__(self, model: nn.Module, levels: bool, gate: bool, device: torch.device):
        self.model, self.levels, self.gate, self.device = model, levels, gate, device
        self.num_levels = model.config.num_align_levels
        self._inputs: dict[str, Any] | None = None
        self.start()
        if levels or gate:
            model.model.register_forward_hook(self._read)

    def start(self) -> None:
        """Forgets everything: a run begins."""
        self.positions = torch.zeros(2, dtype=torch.int64, device=self.device)
        """Attended and all positions of the run so far, in this process."""
        self._clear()

    def _clear(self) -> None:
        # loss and tokens of each level; weights of each level and rows, for each kind of answer
        self._losses = torch.zeros(self.num_levels, 2, device=self.device)
        self._gates = torch.zeros(len(ANSWER_KINDS), self.num_levels + 1, device=self.device)
        self._positions_before = self.positions.clone()

    @contextmanager
    def __call__(self, inputs: dict[str, Any]) -> Iterator[None]:
        """Within it, the model's forward is a training batch's."""
        self._inputs = inputs
        if (mask := inputs.get("attention_mask")) is not None:
            # on the device: reading it here would make a GPU wait at every step
            self.positions += torch.stack([mask.sum(), mask.new_tensor(mask.numel())]).to(self.positions)
        try:
            yield
        finally:
            self._inputs = None

    @torch.no_grad()
    def _read(self, module: nn.Module, args: tuple, output: Any) -> None:
        inputs = self._inputs
        if inputs is None:
            return
        supervised = inputs["labels"][:, 1:] != IGNORE_INDEX
        if self.levels and "align_level" in inputs:
            self._add_losses(output.last_hidden_state[:, :-1], inputs, supervised)
        elif self.gate and output.align_weights is not None:
            self._add_gates(output.align_weights.detach().float(), supervised)

    def _add_losses(self, hidden: torch.Tensor, inputs: dict[str, Any], supervised: torch.Tensor) -> None:
        levels = inputs["align_level"][:, None].expand_as(supervised)[supervised]
        hidden, labels = hidden.detach()[supervised], inputs["labels"][:, 1:][supervised]
        for start in range(0, len(labels), HEAD_POSITIONS):
            part = slice(start, start + HEAD_POSITIONS)
            logits = self.model.logits_of(hidden[part]).float()
            losses = nn.functional.cross_entropy(logits, labels[part], reduction="none")
            self._losses.index_add_(0, levels[part], torch.stack([losses, torch.ones_like(losses)], dim=1))

    def _add_gates(self, weights: torch.Tensor, supervised: torch.Tensor) -> None:
        # the first position of each answer is one that no supervised one stands before
        starts = supervised & ~nn.functional.pad(supervised, (1, -1), value=False)
        mean_length = supervised.sum(1) / starts.sum(1).clamp(min=1)
        has_image = weights.sum(1) > 0
        kinds = (mean_length > SHORT_ANSWER).long()
        rows = torch.cat([weights, torch.ones_like(weights[:, :1])], dim=1) * has_image[:, None]
        self._gates.index_add_(0, kinds, rows)

    def take(self, accelerator: Any) -> dict[str, float]:
        """
        The figures since the last time, over all processes, each of which must call it at once: `padding`, and where
        they are told apart `loss_level_K` and `gate_short_K`, `gate_long_K` (mean weight of level K in rows whose
        answers have at most 8 tokens on average, or more). What no row told of is left out.
        """
        new_positions = (self.positions - self._positions_before).to(self._losses)
        sums = torch.cat([self._losses.flatten(), self._gates.flatten(), new_positions])
        self._clear()
        if accelerator.num_processes > 1:
            sums = accelerator.reduce(sums, reduction="sum")
        losses, gates, positions = sums.cpu().split([self._losses.numel(), self._gates.numel(), 2])
        figures = {"padding": 1 - float(positions[0] / positions[1])} if positions[1] else {}
        for level, (loss, tokens) in enumerate(losses.view(-1, 2).tolist()):
            if tokens:
                figures[f"loss_level_{level}"] = loss / tokens
        for kind, row in zip(ANSWER_KINDS, gates.view(len(ANSWER_KINDS), -1).tolist(), strict=True):
            if row[-1]:
                figures |= {f"gate_{kind}_{level}": weight / row[-1] for level, weight in enumerate(row[:-1])}
        return {name: round(value, 4) for name, value in figures.items()}
