"""What a hostile or damaged checkpoint may hold: refused by name, before anything is built."""

import json
import shutil
from pathlib import Path

import pytest
from convert_parts import CHECKPOINT, NORM, TOWER, reconfigure, refused, rewrite


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A copy of the finetuned checkpoint that a test may change; its tower lies beside it."""
    shutil.copytree(TOWER, tmp_path / TOWER.name)
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "checkpoint"))


def test_weights_that_are_not_finite(checkpoint):
    def spoil(weights):
        weights[NORM][0] = float("nan")
        weights["lm_head.weight"][0, 0] = float("inf")

    rewrite(checkpoint, spoil)
    refused(checkpoint, r"2 weights hold NaN or infinity: lm_head\.weight, model\.norm\.weight")


@pytest.mark.parametrize("layer", [99, -99, "last", True, 1.5])
def test_a_layer_that_the_tower_does_not_have(layer, checkpoint):
    reconfigure(checkpoint, mm_vision_select_layer=layer)
    refused(checkpoint, r"mm_vision_select_layer=.* is none of the vision tower's \d+ layers")


@pytest.mark.parametrize("depth", [10_000_000, 1, "two", None, -1])
def test_a_depth_that_the_weights_do_not_have_is_found_before_anything_is_built(depth, checkpoint):
    reconfigure(checkpoint, num_hidden_layers=depth)
    refused(checkpoint, r"num_hidden_layers is .*, but the weights are those of \d+ layers|no llama can be made of it")


@pytest.mark.parametrize(
    "fields", [{"hidden_size": "wide"}, {"num_attention_heads": 0}, {"vocab_size": -5}, {"rms_norm_eps": []}]
)
def test_configs_that_no_model_can_be_made_of(fields, checkpoint):
    reconfigure(checkpoint, **fields)
    refused(checkpoint, "no (llama|model) can be made of it|do not fit the config|has .* tokens")


@pytest.mark.parametrize("shard", ["../../secret.bin", "/etc/hostname", 3, None, ["a"]])
def test_an_index_that_names_something_else(shard, checkpoint):
    index = {"metadata": {}, "weight_map": {NORM: shard}}
    (checkpoint / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    refused(checkpoint, "its weight_map must name files of this folder")


def test_links_are_not_copied_through(checkpoint, tmp_path):
    (tmp_path / "private").write_text("{}")
    (checkpoint / "special_tokens_map.json").unlink()
    (checkpoint / "special_tokens_map.json").symlink_to(tmp_path / "private")
    refused(checkpoint, r"special_tokens_map\.json is a link out of its folder")
