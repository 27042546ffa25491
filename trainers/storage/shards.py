"""Sharded checkpoints (torch.distributed.checkpoint) made whole, a weight at a time."""

import os
import warnings
from functools import partial
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import GenerationConfig

from aligngpt_shared.files import new_folder
from aligngpt_shared.weights import StoredWeights, save_model
from modeling_aligngpt import AlignGPTConfig, AlignGPTForConditionalGeneration, AlignGPTProcessor

from .manifest import damage
from .saved_model import check_saved


WEIGHTS = "pytorch_model_fsdp_0"
"""Folder of a checkpoint that holds the processes' parts of the weights, as accelerate names it."""
_PREFIX = "model."
"""What accelerate puts in front of the weights' names there."""


def consolidate(checkpoint: str | os.PathLike, output: str | os.PathLike, *, max_shard_size: str = "5GB") -> int:
    """
    Writes the model of a sharded checkpoint as a folder like any other. It needs no GPU, and memory for the greatest
    weight file that it writes.

    Args:
        checkpoint: what a run under FSDP with SHARDED_STATE_DICT has saved.
        output: folder to write; must not exist.
        max_shard_size: greatest size of a weight file.

    Returns:
        Number of parameters.

    Raises:
        ValueError: it is no such checkpoint, or damaged; names the file.
    """
    checkpoint = Path(checkpoint)
    if not (checkpoint / WEIGHTS / ".metadata").is_file():
        raise ValueError(f"{checkpoint} is no sharded checkpoint: it has no {WEIGHTS}/.metadata.")
    if wrong := damage(checkpoint):
        raise ValueError(f"{checkpoint} is damaged: {wrong}. Take an earlier checkpoint.")
    config = AlignGPTConfig.from_pretrained(checkpoint)
    weights = sharded_weights(checkpoint / WEIGHTS)
    # a head that shares the embeddings' rows stands there twice
    if config.tie_word_embeddings and "lm_head.weight" in weights:
        weights.drop(["lm_head.weight"])
    dtype = config.dtype or next(value.dtype for value in weights.values())
    for name, value in list(weights.items()):
        if value.is_floating_point() and value.dtype != dtype:
            weights.change(name, lambda value: value.to(dtype))
    with torch.device("meta"):
        model = AlignGPTForConditionalGeneration(config).to(dtype)
    if (checkpoint / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint)
    with new_folder(output) as beside:
        save_model(model, weights, beside, max_shard_size)
        AlignGPTProcessor.from_pretrained(checkpoint).save_pretrained(beside)
        check_saved(beside)
    return sum(value.numel() for value in weights.values())


def sharded_weights(folder: Path) -> StoredWeights:
    """The weights of a torch.distributed.checkpoint, each put together from its parts when it is read."""
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    weights = StoredWeights()
    for key, about in stored.items():
        if isinstance(about, TensorStorageMetadata):
            weights.put_later(
                key.removeprefix(_PREFIX),
                torch.empty(about.size, dtype=about.properties.dtype, device="meta"),
                partial(_read, folder, key, about),
            )
    return weights


def _read(folder: Path, key: str, about: TensorStorageMetadata) -> torch.Tensor:
    found = {key: torch.empty(about.size, dtype=about.properties.dtype)}
    with warnings.catch_warnings():
        # that there are no other processes, which no_dist says
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(found, storage_reader=FileSystemReader(folder), no_dist=True)
    return found[key]
