"""Sharded checkpoints (torch.distributed.checkpoint) made whole."""

import os
import shutil
import tempfile
from pathlib import Path

from aligngpt_shared.files import new_folder
from modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor

from .manifest import damage
from .saved_model import check_saved


WEIGHTS = "pytorch_model_fsdp_0"
"""Folder of a checkpoint that holds the processes' parts of the weights, as accelerate names it."""


def consolidate(checkpoint: str | os.PathLike, output: str | os.PathLike) -> int:
    """
    Writes the model of a sharded checkpoint as a folder like any other; takes memory for the model, and no GPU.

    Args:
        checkpoint: what a run under FSDP with SHARDED_STATE_DICT has saved.
        output: folder to write; must not exist.

    Returns:
        Number of parameters.

    Raises:
        ValueError: it is no such checkpoint, or damaged; names the file.
    """
    from accelerate.utils import merge_fsdp_weights

    checkpoint = Path(checkpoint)
    if not (checkpoint / WEIGHTS / ".metadata").is_file():
        raise ValueError(f"{checkpoint} is no sharded checkpoint: it has no {WEIGHTS}/.metadata.")
    if wrong := damage(checkpoint):
        raise ValueError(f"{checkpoint} is damaged: {wrong}. Take an earlier checkpoint.")
    with new_folder(output) as beside, tempfile.TemporaryDirectory(dir=beside.parent) as whole:
        for path in checkpoint.iterdir():
            if path.suffix in (".json", ".py"):
                shutil.copyfile(path, Path(whole) / path.name)
        merge_fsdp_weights(str(checkpoint / WEIGHTS), whole)
        model = AlignGPTForConditionalGeneration.from_pretrained(whole, dtype="auto")
        model.save_pretrained(beside)
        AlignGPTProcessor.from_pretrained(checkpoint).save_pretrained(beside)
        check_saved(beside)
    return sum(parameter.numel() for parameter in model.parameters())
