"""What is tried of language models and vision towers before anything is read: families that fit, and those refused."""

import json

import pytest
import torch
from modeling.tiny import CLIP, IMAGE_SIZE, LLAMA, PATCH_SIZE
from transformers import AutoConfig, AutoModelForCausalLM

from modeling_aligngpt import AlignGPTConfig, AlignGPTForConditionalGeneration, backbones
from modeling_aligngpt.backbones import (
    BackboneError,
    backbone_of,
    check_language_model,
    check_vision_tower,
    few_layers,
    read_config,
)


WIDTHS = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
MIXTURE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
# Families with their usual factors.
ACCEPTED = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "smollm3": {},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "final_logit_softcapping": 30.0},
    "gemma3_text": {"head_dim": 16},
    "phi": {},
    "phi3": {},
    "llama4_text": {"head_dim": 16, "num_local_experts": 2, "intermediate_size_mlp": 96},
    "cohere": {"logit_scale": 0.0625},
    "cohere2": {"logit_scale": 0.0625},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22},
    "falcon_h1": {
        "lm_head_multiplier": 0.1,
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
    },
    "hyperclovax": {"logits_scaling": 0.5},
    "olmo2": {},
    "glm4": {},
    "stablelm": {"use_qkv_bias": True},
    "starcoder2": {},
    "gpt_neox": {},
    "gpt2": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "bloom": {},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2},
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, **MIXTURE},
    "qwen3_next": {
        **MIXTURE,
        "num_experts": 4,
        "num_hidden_layers": 4,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "shared_expert_intermediate_size": 32,
    },
}


def language_config(model_type: str, **values):
    common = {**WIDTHS, "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 128}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return AutoConfig.for_model(model_type, **{**common, **ids, **values})


@pytest.mark.parametrize("family", ACCEPTED)
def test_logits_are_those_of_the_familys_own_class(family):
    check_language_model(language_config(family, **ACCEPTED[family]), family)


@pytest.mark.parametrize("family", ["cohere", "granite", "falcon_h1", "gemma2", "hyperclovax"])
def test_a_factor_that_is_dropped_is_found(family, monkeypatch):
    """The trial fails for each family whose head does more, once this code does not do it."""
    values = dict(ACCEPTED[family])
    if family == "gemma2":
        values["final_logit_softcapping"] = 0.01
        monkeypatch.setattr(AlignGPTConfig, "head_scale", property(lambda config: 2.0))
    else:
        monkeypatch.setattr(AlignGPTConfig, "head_scale", property(lambda config: 1.0))
    with pytest.raises(
        BackboneError, match=rf"language model 'some/{family}' \({family}\): its own class computes other"
    ):
        check_language_model(language_config(family, **values), f"some/{family}")


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("mamba", "cannot be used here"),
        ("bert", "cannot be used here|other logits|cache"),
        ("gemma3n_text", "cannot be used here"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(family, reason):
    values = {"is_decoder": True} if family == "bert" else {}
    with pytest.raises(BackboneError, match=reason) as refusal:
        check_language_model(language_config(family, **values), "some/model")
    assert str(refusal.value).startswith(f"language model 'some/model' ({family}): ")
    assert "\n" not in str(refusal.value) and str(refusal.value).endswith(
        "See docs/backbones.md for what is known to work."
    )


def test_a_model_without_a_config_is_named(tmp_path):
    with pytest.raises(BackboneError, match=r"language model .*gone.*: its config cannot be read by transformers"):
        read_config(tmp_path / "gone", "language model")


@pytest.mark.parametrize("saved_by_transformers", [False, True])
def test_a_timm_model_is_refused_for_what_its_config_lacks(tmp_path, saved_by_transformers):
    """With timm installed or without: its folder on the Hub as timm writes it, or as transformers' wrapper does."""
    config = {"architecture": "vit_base_patch16_siglip_224", "pretrained_cfg": {"input_size": [3, 224, 224]}}
    config |= {"model_type": "timm_wrapper", "label_names": []} if saved_by_transformers else {"num_features": 768}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BackboneError, match=r"vision tower .* is a timm model \(vit_base_patch16_sig") as e:
        read_config(tmp_path, "vision tower")
    assert "needs timm and torchvision" in str(e.value) and "transformers' own format" in str(e.value)


def test_the_copy_keeps_one_layer_of_each_kind_and_all_factors():
    config = language_config("qwen3_next", **ACCEPTED["qwen3_next"])
    small = few_layers(config)
    assert sorted(set(small.layer_types)) == sorted(set(config.layer_types))
    assert small.num_hidden_layers == len(small.layer_types) == 2
    granite = few_layers(language_config("granite", **ACCEPTED["granite"], hidden_act="relu"))
    assert (granite.logits_scaling, granite.embedding_multiplier, granite.hidden_act) == (8.0, 12.0, "relu")
    assert granite.hidden_size == 64 and granite.num_hidden_layers == 2 and granite.intermediate_size == 64


@pytest.mark.parametrize("family", ["cohere", "granite", "opt", "gpt2"])
def test_tied_heads_and_scales_survive_saving(family, tmp_path):
    """The embedding has another name in each; a saved model gives the same logits."""
    text = language_config(family, **ACCEPTED[family], tie_word_embeddings=True)
    text.vocab_size = 256
    torch.manual_seed(0)
    own = AutoModelForCausalLM.from_config(text).eval()
    config = AlignGPTConfig(vision_config=dict(CLIP), text_config=text, image_token_id=254, align_token_id=255)
    model = AlignGPTForConditionalGeneration(config).eval()
    model.model.language_model.load_state_dict(backbone_of(own).state_dict())
    model.tie_weights()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded, report = AlignGPTForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.randint(3, 250, (2, 6))
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, own(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


# ---- towers ----

TOWERS = {
    "clip_vision_model": 1,
    "siglip_vision_model": 0,
    "dinov2": 1,
    "dinov2_with_registers": 5,
    "dinov3_vit": 5,
    "aimv2_vision_model": 0,
    "ijepa": 0,
    "vit": 1,
}


def tower_config(model_type: str, **values):
    registers = {"num_register_tokens": 4} if model_type == "dinov3_vit" else {}
    vision = {**CLIP, "model_type": model_type, **registers, **values}
    vision.pop("projection_dim")
    return AlignGPTConfig(vision_config=vision, text_config=dict(LLAMA), image_token_id=60, align_token_id=61)


@pytest.mark.parametrize("family", TOWERS)
def test_towers_that_fit(family):
    config = tower_config(family)
    assert config.num_prefix_tokens == TOWERS[family]
    assert config.image_seq_length == (IMAGE_SIZE // PATCH_SIZE) ** 2
    check_vision_tower(config, family)


def test_registers_are_dropped_with_the_class_token():
    config = tower_config("dinov3_vit")
    model = AlignGPTForConditionalGeneration(config).eval()
    images = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    with torch.no_grad():
        hidden = model.model.vision_tower(images, output_hidden_states=True).hidden_states[-2]
        expected = model.model.multi_modal_projector(hidden[:, 5:])
        got = torch.stack(tuple(model.get_image_features(images).pooler_output))
    torch.testing.assert_close(got, expected)


def test_tokens_in_front_that_nobody_knows_are_found(monkeypatch):
    monkeypatch.setattr(AlignGPTConfig, "num_prefix_tokens", property(lambda config: 2))
    config = tower_config("clip_vision_model")
    with pytest.raises(BackboneError, match="an image becomes 3 tokens, not image_seq_length=4"):
        check_vision_tower(config, "some/tower")


@pytest.mark.parametrize("family", ["siglip2_vision_model", "metaclip_2_vision_model"])
def test_towers_that_do_not_fit_are_refused(family):
    with pytest.raises(BackboneError, match=rf"vision tower 'some/tower' \({family}\): it cannot be used here"):
        check_vision_tower(tower_config(family), "some/tower")


def test_small_copies_are_small():
    """A 7B model's copy: its vocabulary and middle widths do not matter."""
    config = AutoConfig.for_model("llama", hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(few_layers(config))
    assert sum(parameter.numel() for parameter in model.parameters()) < 2**28
    assert model.config.vocab_size == backbones.SMALL_VOCABULARY
