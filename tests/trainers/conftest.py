"""Fixtures of the trainers' tests; what they are made of stands in `stage_parts.py`."""

import pytest
from datasets import Dataset
from stage_parts import NUM_LEVELS, conversation_rows, pair_rows, save_parts, settings, to_dataset

from modeling_aligngpt.assembly import assemble


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    """Folders of a language model and a CLIP, random weights: `(language_model, vision_tower)`."""
    return save_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture
def assembled(parts):
    """A fresh `(model, processor)`."""
    return assemble(*parts, num_align_levels=NUM_LEVELS, gate_hidden_size=16, seed=0)


@pytest.fixture
def pairs() -> Dataset:
    return to_dataset(pair_rows(16))


@pytest.fixture
def conversations() -> Dataset:
    return to_dataset(conversation_rows(16))


@pytest.fixture(scope="session")
def stage1_folder(parts, tmp_path_factory):
    """A model that has been through a short stage 1."""
    from aligngpt_trainers import AlignGPTPretrainConfig, AlignGPTPretrainTrainer

    folder = tmp_path_factory.mktemp("stage1")
    model, processor = assemble(*parts, num_align_levels=NUM_LEVELS, gate_hidden_size=16, seed=0)
    trainer = AlignGPTPretrainTrainer(
        model, settings(AlignGPTPretrainConfig, folder), to_dataset(pair_rows(16)), processing_class=processor
    )
    trainer.train()
    trainer.save_final()
    return folder
