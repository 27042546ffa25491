"""Train the tiny parts kept in `parts/` (`python -m aligngpt_playground train-parts`)."""

import inspect
import os
from pathlib import Path


PARTS = ("clip", "llama")


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
    unknown = sorted(settings.keys() - inspect.signature(train).parameters.keys())
    if unknown:
        raise ValueError(f"{part} has no setting {unknown[0]}: see `train_{part}.train`")
    return train(output, **settings)
