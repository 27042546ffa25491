"""The authors' tiny checkpoint, and ways to change it, for the tests of conversion."""

import json
from pathlib import Path

import pytest
import torch
from parity.golden import GOLDEN

from aligngpt_hub.original.convert import convert_checkpoint


CHECKPOINT = GOLDEN / "checkpoint"
TOWER = GOLDEN / json.loads((CHECKPOINT / "config.json").read_text())["mm_vision_tower"]
WEIGHTS = "pytorch_model.bin"
NORM = "model.norm.weight"


def load_bin(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, map_location="cpu", weights_only=True)


def rewrite(checkpoint: Path, change) -> None:
    """Apply `change` to the checkpoint's weights."""
    weights = load_bin(checkpoint / WEIGHTS)
    change(weights)
    torch.save(weights, checkpoint / WEIGHTS)


def reconfigure(checkpoint: Path, **fields) -> None:
    """Overwrite fields of the checkpoint's config."""
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def refused(checkpoint: Path, match: str, **kwargs) -> None:
    """The conversion raises a ValueError that says `match`, and leaves nothing behind."""
    before = sorted(checkpoint.parent.iterdir())
    with pytest.raises(ValueError, match=match):
        convert_checkpoint(checkpoint, checkpoint.parent / "ours", **kwargs)
    assert sorted(checkpoint.parent.iterdir()) == before
