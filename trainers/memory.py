"""What memory a stage takes on one device: by the tensors that are there, and by what autograd keeps of a batch."""

import math
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING

import torch
from accelerate.utils import send_to_device
from torch import nn


if TYPE_CHECKING:
    from .stage import StageTrainer

# Bytes of optimizer state for each trained parameter, where they do not depend on its dtype.
STATE_BYTES = {"sgd": 0, "adafactor": 0, "adamw_8bit": 2, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2, "lion_8bit": 1}
# How many states of the parameter's own dtype other optimizers keep; 2 (the AdamW family) when not named.
STATES = {"adagrad": 1, "rmsprop": 1, "lion_32bit": 1, "paged_lion_32bit": 1}
STEP_BYTES = 4  # AdamW's step counter, one a parameter tensor


def count_parameters(model: nn.Module) -> dict[str, dict[str, int]]:
    """
    For each part of a model (vision tower, projector, ...) its parameters: `trained` and `all`. Tied ones are counted
    once, where they come first.
    """
    counts: dict[str, Counter] = {}
    for name, parameter in model.named_parameters():
        parts = [part for part in name.split(".") if part not in ("base_model", "model", "module")]
        count = counts.setdefault(parts[0], Counter())
        count["all"] += _numel(parameter)
        count["trained"] += _numel(parameter) * parameter.requires_grad
    return {name: {"trained": count["trained"], "all": count["all"]} for name, count in counts.items()}


def _numel(parameter: nn.Parameter) -> int:
    # four-bit weights are packed, two in a byte
    return parameter.numel() * (2 if type(parameter).__name__ == "Params4bit" else 1)


def optimizer_bytes(model: nn.Module, optimizer: str = "adamw_torch") -> int:
    """Bytes of the states that an optimizer (a name of `optim`) will keep for the model's trained parameters."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if optimizer in STATE_BYTES:
        return STATE_BYTES[optimizer] * sum(parameter.numel() for parameter in trained)
    steps = STEP_BYTES * len(trained) if optimizer in ("adamw_torch", "adamw_torch_fused") else 0
    return STATES.get(optimizer, 2) * sum(parameter.nbytes for parameter in trained) + steps


def memory_of(trainer: "StageTrainer", batch: dict[str, torch.Tensor] | None) -> dict[str, int | None]:
    """
    Bytes on one device: `weights` (and buffers), `gradients`, states of the `optimizer`, and `activations`, what
    autograd keeps of the forward pass of a batch with the run's own checkpointing (`None` without a batch).

    Not in it: one layer computed anew in the backward pass (with checkpointing), what the allocator loses, and the
    GPU's own context.
    """
    model = trainer.model
    return {
        "weights": sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]),
        "gradients": sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad),
        "optimizer": optimizer_bytes(model, getattr(trainer.args.optim, "value", str(trainer.args.optim))),
        "activations": None if batch is None else saved_bytes(trainer, batch),
    }


def saved_bytes(trainer: "StageTrainer", batch: dict[str, torch.Tensor]) -> int:
    """Bytes that the forward pass of a batch keeps for the backward pass, parameters left out."""
    model, kept = trainer.model, {}
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    if trainer.args.gradient_checkpointing:
        with suppress(AttributeError):  # a wrapper that hands no such call on
            model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    training, _ = model.training, model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), trainer.compute_loss_context_manager():
        trainer.compute_loss(model, send_to_device(dict(batch), trainer.args.device))
    model.train(training)
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)


def describe_bytes(number: float) -> str:
    """`1.5 GiB`, `34.0 MiB`, ..."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(int(math.log(number, 1024)), len(units) - 1) if number >= 1 else 0
    return f"{number / 1024**power:.{1 if power else 0}f} {units[power]}"
