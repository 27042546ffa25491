"""Saving and loading: weights, code, Auto classes, resizing, tied embeddings."""

import copy
import json

import pytest
import torch
from modeling.tiny import ALIGN, IMAGE, MIXED_ROWS, make_batch, prompts, row, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, CLIPVisionModel

from modeling_aligngpt import (
    AlignGPTForConditionalGeneration,
    AlignGPTModel,
    AlignGPTPreTrainedModel,
    AutoModelForVision2Seq,
)
from modeling_aligngpt.configuration_aligngpt import AUTO_MAP


def logits(model, rows=MIXED_ROWS):
    with torch.no_grad():
        return model(**make_batch(rows)).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_keeps_every_weight(tmp_path, dtype):
    model = tiny_model().to(dtype)
    model.save_pretrained(tmp_path)
    loaded, report = AlignGPTForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.dtype == dtype
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    if dtype == torch.float32:  # `to(bfloat16)` also rounds rotary frequencies, which are not weights
        assert torch.equal(logits(model), logits(loaded))
    assert loaded.generation_config.suppress_tokens == [IMAGE, ALIGN]
    assert loaded.config.to_dict().items() >= {"align_mode": "gate", "image_token_id": IMAGE}.items()


def test_a_saved_folder_holds_code_and_names_its_classes(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    for name in ("modeling_aligngpt.py", "configuration_aligngpt.py", "compat_v4.py"):
        assert (tmp_path / name).read_text().startswith('"""'), name
    modules = {reference.split(".")[0] for reference in AUTO_MAP.values()}
    assert modules == {"modeling_aligngpt", "configuration_aligngpt", "processing_aligngpt"}
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        parts = {".".join(name.split(".")[:2]) for name in file.keys()}  # noqa: SIM118
    expected = {"vision_tower", "multi_modal_projector", "align_embeddings", "align_gate", "language_model"}
    assert parts == {f"model.{name}" for name in expected} | {"lm_head.weight"}


@pytest.mark.parametrize(
    ("auto_class", "expected"),
    [
        (AutoModel, AlignGPTModel),
        (AutoModelForImageTextToText, AlignGPTForConditionalGeneration),
        (AutoModelForMultimodalLM, AlignGPTForConditionalGeneration),
        (AutoModelForVision2Seq, AlignGPTForConditionalGeneration),
    ],
)
def test_auto_classes_where_the_package_is_imported(tmp_path, auto_class, expected):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path)
    assert type(loaded) is expected
    inner = getattr(loaded, "model", loaded)
    assert all(torch.equal(a, b) for a, b in zip(model.model.parameters(), inner.parameters(), strict=True))
    assert type(auto_class.from_config(model.config)) is expected


def test_vision2seq_is_made_by_its_class_methods_alone():
    with pytest.raises(OSError, match="from_pretrained"):
        AutoModelForVision2Seq()


def test_the_base_model_saves_too(tmp_path):
    model = tiny_model()
    model.model.save_pretrained(tmp_path)
    loaded = AlignGPTModel.from_pretrained(tmp_path)
    with torch.no_grad():
        ours, theirs = (inner(**make_batch(MIXED_ROWS)).last_hidden_state for inner in (model.model, loaded))
    assert torch.equal(ours, theirs)


def test_sharded_weights(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert torch.equal(logits(AlignGPTForConditionalGeneration.from_pretrained(tmp_path)), logits(model))


def test_resizing_keeps_the_old_rows(tmp_path):
    model = tiny_model()
    before = logits(model)
    model.resize_token_embeddings(80)
    assert model.config.text_config.vocab_size == 80
    assert model.get_input_embeddings().num_embeddings == model.lm_head.out_features == 80
    torch.testing.assert_close(logits(model)[..., :64], before)
    loss = model(**make_batch([row(5, 6, 79)]), labels=torch.tensor([row(5, 6, 79)])).loss
    assert torch.isfinite(loss)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AlignGPTForConditionalGeneration.from_pretrained(tmp_path)), logits(model))


def test_tied_embeddings_stay_tied(tmp_path):
    model = tiny_model({"tie_word_embeddings": True})
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    loaded = AlignGPTForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert torch.equal(logits(loaded), logits(model))
    loaded.resize_token_embeddings(80)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight


def test_an_own_generation_config_is_kept(tmp_path):
    model = tiny_model()
    model.generation_config.suppress_tokens = [5, IMAGE, ALIGN]
    model.generation_config.temperature, model.generation_config.do_sample = 0.2, True
    model.save_pretrained(tmp_path)
    loaded = AlignGPTForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.generation_config.suppress_tokens == [5, IMAGE, ALIGN]
    assert loaded.generation_config.temperature == 0.2
    assert loaded.generate(**prompts(MIXED_ROWS), max_new_tokens=2).shape[0] == 3


def test_a_generation_config_that_transformers_would_not_save_is_mended(tmp_path, caplog):
    model = tiny_model()
    for name, value in {"temperature": 0.9, "top_p": 0.6, "length_penalty": 2.0, "max_length": 300}.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(tmp_path)
    assert caplog.text.count("temperature=0.9, top_p=0.6, length_penalty=2.0 left out") == 1
    model.save_pretrained(tmp_path / "again")
    assert caplog.text.count("left out") == 1
    loaded = AlignGPTForConditionalGeneration.from_pretrained(tmp_path).generation_config
    assert (loaded.temperature, loaded.top_p, loaded.length_penalty) == (None, None, None)
    assert (loaded.max_length, loaded.max_new_tokens) == (300, None)  # a limit of the model's own stays


def test_missing_weights_follow_each_part_s_own_rule_and_loaded_ones_stay():
    config = tiny_model().config
    drawn = AlignGPTForConditionalGeneration(copy.deepcopy(config))
    kept = {name: value for name, value in tiny_model().state_dict().items() if "language_model" in name}
    loaded = AlignGPTForConditionalGeneration.from_pretrained(
        None, config=copy.deepcopy(config), state_dict={name: value.clone() for name, value in kept.items()}
    )
    for name, value in loaded.state_dict().items():
        if name in kept:
            assert torch.equal(value, kept[name]), name
        elif value.is_floating_point() and value.numel() > 256:
            # CLIP draws its layers by width and depth, not with one standard deviation
            assert value.std().item() == pytest.approx(drawn.state_dict()[name].std().item(), rel=0.25), name


def test_why_is_custom_code_is_answered_with_no(tmp_path, monkeypatch):
    """Missing weights of a tower are drawn by its own rule; for "custom code" transformers takes a plain one."""
    tiny_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    missing = [name for name in weights if name.startswith("model.vision_tower.encoder")]
    save_file({k: v for k, v in weights.items() if k not in missing}, tmp_path / "model.safetensors", {"format": "pt"})
    name = "model.vision_tower.encoder.layers.0.self_attn.out_proj.weight"
    stds = {}
    for answer in (False, True):
        monkeypatch.setattr(AlignGPTPreTrainedModel, "is_custom_code", classmethod(lambda cls, answer=answer: answer))
        loaded = AlignGPTForConditionalGeneration.from_pretrained(tmp_path)
        stds[answer] = float(loaded.state_dict()[name].std())
    monkeypatch.undo()
    torch.manual_seed(0)
    clip = CLIPVisionModel(loaded.config.vision_config).state_dict()
    wanted = float(next(v for k, v in clip.items() if k.endswith("layers.0.self_attn.out_proj.weight")).std())
    assert not AlignGPTPreTrainedModel.is_custom_code()
    assert stds[False] == pytest.approx(wanted, rel=0.2) and stds[True] < wanted / 5
