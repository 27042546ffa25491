"""AlignGPTConfig: defaults, what follows from the parts, round trips, and what is refused."""

import json

import pytest
from modeling.tiny import CLIP, LLAMA, SEQ_LENGTH, SIGLIP, tiny_config
from transformers import AutoConfig, CLIPVisionConfig, GemmaConfig, LlamaConfig, Qwen2Config

from modeling_aligngpt import ALIGN_MODES, GATE_CONTEXTS, AlignGPTConfig
from modeling_aligngpt.configuration_aligngpt import VERSION


def test_defaults_are_the_release():
    config = AlignGPTConfig()
    assert config.image_seq_length == 576
    assert config.vision_config.model_type == "clip_vision_model" and config.vision_config.image_size == 336
    assert config.text_config.model_type == "llama"
    assert (config.num_align_levels, config.gate_hidden_size, config.vision_feature_layer) == (8, 256, -2)
    assert (config.align_mode, config.gate_context, config.training_stage) == ("gate", "first_turn", None)
    assert config.get_text_config() is config.text_config


def test_importing_the_package_registers_it():
    config = AutoConfig.for_model("aligngpt", text_config={"model_type": "qwen2", "hidden_size": 64})
    assert isinstance(config, AlignGPTConfig)
    assert isinstance(config.text_config, Qwen2Config) and config.text_config.hidden_size == 64


def test_parts_as_configs():
    vision, text = CLIPVisionConfig(**{**CLIP, "image_size": 16}), LlamaConfig(**LLAMA)
    config = AlignGPTConfig(vision_config=vision, text_config=text)
    assert config.vision_config is vision and config.text_config is text
    assert config.image_seq_length == 16


@pytest.mark.parametrize(
    ("vision", "strategy", "expected"),
    [
        (CLIP, "default", SEQ_LENGTH),
        (CLIP, "full", SEQ_LENGTH + 1),
        (SIGLIP, "full", SEQ_LENGTH),
        ({**SIGLIP, "image_size": 9}, "full", SEQ_LENGTH),
    ],
)
def test_positions_of_a_image_follow_from_the_tower(vision, strategy, expected):
    config = tiny_config(vision_config=vision, vision_feature_select_strategy=strategy)
    assert config.image_seq_length == expected
    again = tiny_config(vision_config=vision, vision_feature_select_strategy=strategy, image_seq_length=expected)
    assert again.image_seq_length == expected


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"align_mode": "gated"}, "align_mode='gated' is not one of level, gate"),
        ({"gate_context": "answer"}, "gate_context='answer'"),
        ({"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy='cls'"),
        ({"num_align_levels": 1}, "num_align_levels=1"),
        ({"default_align_level": 8}, r"default_align_level=8 is not in 0\.\.7"),
        ({"default_align_level": -1}, "default_align_level=-1"),
        ({"image_seq_length": 7}, f"image_seq_length=7, but the vision tower yields {SEQ_LENGTH}"),
        ({"vision_config": SIGLIP, "vision_feature_select_strategy": "default"}, "no class token.*full"),
        ({"text_config": {"model_type": "no_such_model"}}, "no_such_model"),
    ],
)
def test_values_that_are_refused(kwargs, said):
    with pytest.raises(ValueError, match=said):
        tiny_config(**kwargs)


@pytest.mark.parametrize("mode", ALIGN_MODES)
@pytest.mark.parametrize("context", GATE_CONTEXTS)
def test_round_trip(tmp_path, mode, context):
    config = tiny_config(
        align_mode=mode, gate_context=context, default_align_level=3, training_stage="instruct", num_align_levels=5
    )
    config.save_pretrained(tmp_path)
    for loaded in (AlignGPTConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert isinstance(loaded, AlignGPTConfig)
        loaded._name_or_path = config._name_or_path
        assert loaded.to_dict() == config.to_dict()
    changed = AlignGPTConfig.from_pretrained(tmp_path, align_mode="level", default_align_level=1)
    assert (changed.align_mode, changed.default_align_level, changed.gate_context) == ("level", 1, context)


def test_what_0_1_0_saved_as_mean_stays_the_mean_of_all_levels(tmp_path):
    tiny_config(align_mode="mean").save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["align_mode"], saved["aligngpt_version"]) == ("mean", VERSION)
    assert AlignGPTConfig.from_pretrained(tmp_path).align_mode == "mean"
    (tmp_path / "config.json").write_text(json.dumps({**saved, "aligngpt_version": "0.1.0"}))
    loaded = AlignGPTConfig.from_pretrained(tmp_path)
    assert loaded.align_mode == AutoConfig.from_pretrained(tmp_path).align_mode == "mean_of_all"
    assert AlignGPTConfig.from_pretrained(tmp_path, align_mode="mean").align_mode == "mean"
    loaded.save_pretrained(tmp_path)
    assert AlignGPTConfig.from_pretrained(tmp_path).align_mode == "mean_of_all"


@pytest.mark.parametrize(
    ("rope", "theta", "scaling"),
    [
        ({"rope_theta": 5e5}, 5e5, None),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            1e4,
            {"rope_type": "linear", "factor": 2.0},
        ),
    ],
)
def test_saved_rope_can_be_read_by_both_generations(tmp_path, rope, theta, scaling):
    config = tiny_config(rope)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert saved["rope_theta"] == theta and saved.get("rope_scaling") == scaling  # for 4.57
    assert saved["rope_parameters"]["rope_theta"] == theta
    loaded = AlignGPTConfig.from_pretrained(tmp_path)
    assert loaded.text_config.to_dict() == config.text_config.to_dict()


def test_tied_embeddings_follow_the_language_model():
    assert not tiny_config().tie_word_embeddings
    assert tiny_config({"tie_word_embeddings": True}).tie_word_embeddings
    assert AlignGPTConfig(text_config=GemmaConfig(hidden_size=32), vision_config=CLIP).tie_word_embeddings
