"""Train the tiny parts kept in `parts/` (`python -m aligngpt_playground train-parts`)."""

import math
import os
from pathlib import Path


PARTS = ("clip", "llama")


def build_optimizer(parameters: list, learning_rate: float, steps: int, longest_warmup: int) -> tuple:
    """AdamW with a linear warm-up (a tenth of the steps, at most `longest_warmup`) under a cosine; and its schedule."""
    import torch

    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    warmup = min(longest_warmup, steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * min(step, steps) / steps)) + 1e-3),
    )
    return optimizer, schedule


def train_part(part: str, output: str | os.PathLike, **settings) -> dict[str, float]:
    """Train one part and save it.

    Args:
        part: one of `PARTS`.
        output: the folder to write.
        settings: `steps`, `batch_size`, `learning_rate`, `seed`, ...: see `train_clip.train` and `train_llama.train`.

    Returns:
        Held-out figures.

    Raises:
        ValueError: there is no such part, or `output` exists and holds something else than a model.
    """
    if part not in PARTS:
        raise ValueError(f"part is {part!r}; it must be one of {PARTS}")
    output = Path(output)
    if output.exists() and (not output.is_dir() or (any(output.iterdir()) and not (output / "config.json").is_file())):
        raise ValueError(f"output {output} exists and is not a model folder; choose a new one")
    if part == "clip":
        from .train_clip import train
    else:
        from .train_llama import train
    return train(output, **settings)
