"""
Did the gate learn anything, and do the levels change anything? Beside a trained gate stand the gate as it was before
stage 2 and random ones: kinds of questions differ in what any gate reads, so a difference between kinds alone shows
nothing.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from aligngpt_shared.records import GATE_BEFORE
from modeling_aligngpt.modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTMLP

from .probe import LevelProbe
from .statistics import share_between


RANDOM_GATES = 59
"""Enough that a gate beyond all of them has p = 1/60."""


def gates_to_compare(
    probe: LevelProbe, before: str | None, model: str, seed: int
) -> tuple[bool, list[torch.nn.Module]]:
    """
    Gates of the model's shape: the one before stage 2, where it is known, and random ones.

    Args:
        probe: the loaded model.
        before: folder or Hub id of the model before stage 2; `None`: what `model` keeps of it, if anything.
        model: folder of the model itself.
        seed: of the random gates.

    Returns:
        Whether the first is the one from before stage 2, and the gates.
    """
    known = _gate_before(before, model)
    gates = [] if known is None else [_gate_like(probe, known)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gates += [_gate_like(probe, None) for _ in range(RANDOM_GATES)]
    return known is not None, gates


def _gate_before(before: str | None, model: str) -> dict[str, torch.Tensor] | None:
    if before is not None:
        return AlignGPTForConditionalGeneration.from_pretrained(before).model.align_gate.state_dict()
    kept = Path(model) / GATE_BEFORE
    return load_file(kept) if kept.is_file() else None


def _gate_like(probe: LevelProbe, weights: dict[str, torch.Tensor] | None) -> torch.nn.Module:
    config = probe.model.config
    gate = AlignGPTMLP(
        config.image_seq_length, config.gate_hidden_size, config.num_align_levels - 1, config.projector_hidden_act
    )
    if weights is not None:
        gate.load_state_dict({name: value.float() for name, value in weights.items()})
    return gate.to(probe.device, probe.model.dtype).eval()


def compare_gates(
    share: float | None, others: Sequence[np.ndarray], groups: Sequence[str], has_before: bool
) -> dict[str, Any] | None:
    """
    Where the share of the variance between groups of questions stands among other gates' shares.

    Args:
        share: of the trained gate; `None` where there is one group.
        others: weights `(questions, N - 1)` of the gates of `gates_to_compare`.
        groups: of each question.
        has_before: whether the first is the gate from before stage 2.

    Returns:
        `before` (its share, or None), `random` (mean, least and largest share), `number`, `p` (share of random gates
        with as much, the trained one counted in) and `learned` (p at most 0.05).
    """
    if share is None or not others:
        return None
    shares = [share_between(weights, groups) for weights in others]
    before, drawn = (shares[0], shares[1:]) if has_before else (None, shares)
    p = (1 + sum(each >= share - 1e-12 for each in drawn)) / (1 + len(drawn))
    return {
        "before": before,
        "random": {"mean": float(np.mean(drawn)), "least": min(drawn), "largest": max(drawn)},
        "number": len(drawn),
        "p": p,
        "learned": p <= 0.05,
    }


def steering(
    probe: LevelProbe, questions: Sequence[tuple[str, Sequence, str | None]], max_new_tokens: int
) -> dict[str, Any]:
    """
    What fixed levels change in answers to questions.

    Args:
        probe: the loaded model.
        questions: (question, images, answer if known).

    Returns:
        `number`; `different`: share of questions whose answer at each level is not the model's own; `any`: share that
        are not answered alike at all levels; of the answers that are known (about one image) `loss` a token at each
        level, `own_loss`, and `answers`, how many.
    """
    asked = [(question, shown) for question, shown, _ in questions]
    levels = range(probe.num_align_levels)
    own = probe.answers(asked, None, max_new_tokens)
    at = [probe.answers(asked, level, max_new_tokens) for level in levels]
    known = [(question, shown, answer) for question, shown, answer in questions if answer and len(shown) == 1]
    losses, tokens = np.zeros(probe.num_align_levels + 1), 0
    for question, shown, answer in known:
        found, number = probe.losses(question, shown, answer)
        losses, tokens = losses + np.array(found), tokens + number
    return {
        "number": len(questions),
        "different": [float(np.mean([a != b for a, b in zip(texts, own, strict=True)])) for texts in at],
        "any": float(np.mean([len(set(texts)) > 1 for texts in zip(*at, strict=True)])),
        "answers": len(known),
        "loss": (losses[:-1] / tokens).tolist() if known else None,
        "own_loss": float(losses[-1] / tokens) if known else None,
    }
