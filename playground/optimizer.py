"""The optimizer that both parts are trained with."""

import math


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
