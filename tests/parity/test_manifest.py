"""The manifest is the contract: its files hold what it says, and the tests here compare everything that it lists."""

import pytest
from parity.golden import MANIFEST, TENSOR_FILES, TOLERANCES, read


# compared exactly, or the inputs of what is compared
EXACT = {
    "align_ids",
    "attention_mask",
    "generated",
    "input_ids",
    "labels",
    "logits_argmax",
    "logits_index",
    "out_attention_mask",
    "out_labels",
    "row_source",
    "text_count",
}
PREFIXES = ("grad.", "after.", "padded_uint8_")


@pytest.mark.parametrize("name", TENSOR_FILES)
def test_tensors_are_as_listed(name):
    listed, tensors = MANIFEST["tensors"][f"tensors/{name}.safetensors"], read(name)
    assert tensors.keys() == listed.keys()
    for key, tensor in tensors.items():
        assert list(tensor.shape) == listed[key]["shape"], key
        assert str(tensor.dtype) == f"torch.{listed[key]['dtype']}", key


def test_nothing_listed_goes_uncompared():
    for name, tensors in MANIFEST["tensors"].items():
        for key, facts in tensors.items():
            known = key in EXACT or key in TOLERANCES or key.startswith(PREFIXES)
            assert known or facts["tolerance"] == "none", f"{name}: no test compares {key}"
