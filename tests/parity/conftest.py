"""The authors' two checkpoints, converted once; models are loaded afresh for each test that trains them."""

import pytest
from parity.golden import GOLDEN

from aligngpt_hub.original.convert import convert_checkpoint
from modeling_aligngpt.modeling_aligngpt import AlignGPTForConditionalGeneration
from modeling_aligngpt.processing_aligngpt import AlignGPTProcessor


@pytest.fixture(scope="session")
def stage1_folder(tmp_path_factory):
    output = tmp_path_factory.mktemp("converted") / "stage1"
    return convert_checkpoint(GOLDEN / "stage1", output)  # its config names language model and tower beside it


@pytest.fixture(scope="session")
def stage2_folder(tmp_path_factory):
    output = tmp_path_factory.mktemp("converted") / "stage2"
    return convert_checkpoint(GOLDEN / "checkpoint", output, gate_context="sequence")


@pytest.fixture
def stage1_model(stage1_folder):
    return AlignGPTForConditionalGeneration.from_pretrained(stage1_folder)


@pytest.fixture
def stage2_model(stage2_folder):
    return AlignGPTForConditionalGeneration.from_pretrained(stage2_folder)


@pytest.fixture(scope="session")
def stage1_processor(stage1_folder):
    return AlignGPTProcessor.from_pretrained(stage1_folder)


@pytest.fixture(scope="session")
def stage2_processor(stage2_folder):
    return AlignGPTProcessor.from_pretrained(stage2_folder)
