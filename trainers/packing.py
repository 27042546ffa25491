"""
The language model without padding: rows of a batch stand one behind the other, each with positions and attention of its
own. Everything around it (images, gate, levels, loss) sees the batch as it is.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PretrainedConfig

from modeling_aligngpt.backbones import few_layers


TOLERANCE = 1e-4
"""Largest difference of hidden states in the trial, as a share of the largest."""


def lay_out(lengths: Sequence[int], number: int) -> list[list[int]]:
    """
    Rows by line, so that lines are of like length: each row, the longest first, goes into the shortest line.

    Args:
        lengths: tokens of each row.
        number: of lines, at most that of rows.
    """
    lines: list[list[int]] = [[] for _ in range(number)]
    loads = [0] * number
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        line = min(range(number), key=loads.__getitem__)
        lines[line].append(row)
        loads[line] += lengths[row]
    return lines


class RowPacking:
    """
    Packs what a language model reads while it trains, and unpacks its last hidden states.

    Args:
        language_model: the backbone, which must keep rows of a line apart by their positions
            ([`check_packing`] tries it).
        one_line: all rows in one line, as FlashAttention's kernels for rows of different lengths take them; else two
            rows a line, a long and a short one: attention without such kernels also computes what a mask hides, and
            longer lines hide more.

    `positions` counts those that the language model saw, and those that it would have seen.
    """

    def __init__(self, language_model: nn.Module, one_line: bool):
        self.one_line = one_line
        self.positions = [0, 0]
        self._shape: tuple[int, int] | None = None
        # of the batch that runs: its places of the rows' positions, and the positions of the lines that are rows'
        self._index = self._is_row = torch.empty(0)
        language_model.register_forward_pre_hook(self._pack, with_kwargs=True)
        language_model.register_forward_hook(self._unpack)

    def _pack(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]):
        mask = kwargs.get("attention_mask")
        self._shape = None
        if not module.training or mask is None or mask.ndim != 2:
            return None
        mask = mask.bool()
        lengths = mask.sum(1).tolist()
        lines = lay_out(lengths, 1 if self.one_line else -(-len(lengths) // 2))
        width = max(sum(lengths[row] for row in line) for line in lines)
        self.positions = [self.positions[0] + len(lines) * width, self.positions[1] + mask.numel()]
        if len(lines) * width >= mask.numel():
            return None
        # flat place in the batch of each position of the lines; what fills a line up is a row of its own
        index = torch.zeros(len(lines), width, dtype=torch.long)
        position_ids = torch.arange(width).repeat(len(lines), 1)
        is_row = torch.zeros(len(lines), width, dtype=torch.bool)
        places = [row.nonzero()[:, 0] + number * mask.shape[1] for number, row in enumerate(mask.cpu())]
        for line, rows in enumerate(lines):
            start = 0
            for row in rows:
                stop = start + lengths[row]
                index[line, start:stop] = places[row]
                position_ids[line, start:stop] = torch.arange(lengths[row])
                is_row[line, start:stop] = True
                start = stop
            position_ids[line, start:] = torch.arange(width - start)
        embeds = kwargs["inputs_embeds"]
        self._shape, self._index = tuple(mask.shape), index[is_row].to(embeds.device)
        self._is_row = is_row.to(embeds.device)
        packed = embeds.flatten(0, 1)[index.to(embeds.device)]
        return args, {
            **kwargs,
            "inputs_embeds": packed,
            "attention_mask": None,
            "position_ids": position_ids.to(embeds.device),
            # masks of packed rows are made where there is no cache
            "use_cache": False,
        }

    def _unpack(self, module: nn.Module, args: tuple, output: Any):
        if self._shape is None:
            return None
        hidden = output.last_hidden_state
        rows, length = self._shape
        batch = hidden.new_zeros(rows * length, hidden.shape[-1])
        output.last_hidden_state = batch.index_copy(0, self._index, hidden[self._is_row]).view(rows, length, -1)
        self._shape = None
        return output


def check_packing(config: PretrainedConfig) -> None:
    """
    Tries on a small copy whether a language model keeps packed rows apart.

    Args:
        config: of the language model.

    Raises:
        ValueError: it does not; naming the family.
    """
    small = few_layers(config.get_text_config())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModel.from_config(small, dtype=torch.float32)
        embeds = torch.randn(4, 9, small.hidden_size)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    mask = torch.arange(9)[None] < torch.tensor([9, 4, 3, 2])[:, None]
    model.train()
    try:
        with torch.no_grad():
            expected = model(inputs_embeds=embeds, attention_mask=mask.long(), use_cache=False).last_hidden_state
            packing = RowPacking(model, one_line=False)
            found = model(inputs_embeds=embeds, attention_mask=mask.long(), use_cache=False).last_hidden_state
        difference = float((expected - found)[mask].abs().max() / expected[mask].abs().max())
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"pack_rows: {small.model_type} cannot be packed ({error}).") from error
    if packing.positions[0] >= packing.positions[1] or not difference < TOLERANCE:
        raise ValueError(
            f"pack_rows: {small.model_type} does not keep rows of a line apart (hidden states differ by "
            f"{difference:.1g} of the largest): leave it out."
        )
