"""What a hostile or damaged checkpoint may hold: refused by name, before anything is built."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from convert_parts import CHECKPOINT, NORM, TOWER, WEIGHTS, load_bin, reconfigure, refused, rewrite
from modeling.tiny import tiny_config
from parity.golden import GOLDEN
from safetensors.torch import load_file

from aligngpt_hub.original.convert import convert_checkpoint
from aligngpt_hub.original.export import export_original


STAGE1, BASE_LLM = GOLDEN / "stage1", GOLDEN / "base_llm"


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


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model."])
def test_names_under_a_wrappers_prefix_are_the_same_model(prefix, checkpoint, tmp_path):
    plain = load_file(convert_checkpoint(checkpoint, tmp_path / "plain") / "model.safetensors")
    weights = load_bin(checkpoint / WEIGHTS)
    torch.save({prefix + key: value for key, value in weights.items()}, checkpoint / WEIGHTS)
    wrapped = load_file(convert_checkpoint(checkpoint, tmp_path / "wrapped") / "model.safetensors")
    assert plain.keys() == wrapped.keys() and all(torch.equal(plain[key], wrapped[key]) for key in plain)


def test_weights_of_something_else(checkpoint):
    weights = load_bin(checkpoint / WEIGHTS)
    torch.save({f"elsewhere.{key}": value for key, value in weights.items()}, checkpoint / WEIGHTS)
    refused(checkpoint, r"hold no layer of the language model: elsewhere\..* and \d+ more")


@pytest.mark.parametrize("file", [WEIGHTS, "mm_projector.bin"])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_projector_alone(file, prefix, checkpoint):
    weights = load_bin(checkpoint / WEIGHTS)
    (checkpoint / WEIGHTS).unlink()
    torch.save({prefix + key: value for key, value in weights.items() if "mm_projector" in key}, checkpoint / file)
    refused(checkpoint, r"holds a projector alone, without the level table .*: give the mm_projector_align\.bin")


def test_stage_1_under_another_name(tmp_path):
    """As the authors' code names it at a step in between."""
    stage1 = Path(shutil.copytree(STAGE1, tmp_path / "stage1"))
    parts = {"base_llm": BASE_LLM, "vision_tower": TOWER}
    first = load_file(convert_checkpoint(stage1, tmp_path / "first", **parts) / "model.safetensors")
    file = (stage1 / "mm_projector_align.bin").rename(stage1 / "checkpoint-24000.bin")
    second = load_file(convert_checkpoint(file, tmp_path / "second", **parts) / "model.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("way", [convert_checkpoint, export_original])
def test_an_adapter_is_named_with_the_command_that_merges_it(way, checkpoint, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"adapter holds an adapter .*merge it into its base with peft"):
        way(adapter, tmp_path / "out")
    tiny_config().save_pretrained(adapter)
    with pytest.raises(ValueError, match=r"`aligngpt merge --adapter .*adapter --output DIR` makes one"):
        way(adapter, tmp_path / "out")
