"""A sharded checkpoint made whole; test_sharded.py does so with what two processes have saved."""

import warnings

import pytest
import torch
from demo_model import save_demo_model
from torch.distributed.checkpoint import FileSystemWriter, save

from aligngpt_trainers.commands.merge import WEIGHTS, consolidate
from aligngpt_trainers.storage.manifest import write_manifest
from modeling_aligngpt import AlignGPTConfig, AlignGPTForConditionalGeneration


@pytest.fixture
def checkpoint(tmp_path):
    folder = save_demo_model(tmp_path / "checkpoint")
    model = AlignGPTForConditionalGeneration.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        # two files of parts
        writer = FileSystemWriter(folder / WEIGHTS, single_file_per_rank=False)
        save({"model": model.state_dict()}, storage_writer=writer, no_dist=True)
    write_manifest(folder)
    return folder, model


def test_every_weight_is_there_in_its_values(checkpoint, tmp_path):
    folder, model = checkpoint
    number = consolidate(folder, tmp_path / "whole")
    assert number == sum(parameter.numel() for parameter in model.parameters())
    whole = AlignGPTForConditionalGeneration.from_pretrained(tmp_path / "whole").state_dict()
    expected = model.state_dict()
    assert whole.keys() == expected.keys() and all(torch.equal(whole[name], expected[name]) for name in whole)


def test_weights_take_the_dtype_of_the_config(checkpoint, tmp_path):
    """Under mixed precision FSDP keeps float32; the finished model has the dtype that its config names."""
    folder, model = checkpoint
    config = AlignGPTConfig.from_pretrained(folder)
    config.dtype = config.text_config.dtype = config.vision_config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    write_manifest(folder)
    consolidate(folder, tmp_path / "whole")
    whole = AlignGPTForConditionalGeneration.from_pretrained(tmp_path / "whole", dtype="auto").state_dict()
    for name, value in model.state_dict().items():
        assert whole[name].dtype == torch.bfloat16 and torch.equal(whole[name], value.bfloat16())


def test_a_damaged_part_leaves_nothing(checkpoint, tmp_path):
    folder, _ = checkpoint
    part = max((folder / WEIGHTS).glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:-10])
    with pytest.raises(ValueError, match=f"{part.name} has"):
        consolidate(folder, tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
