"""Every supported family of language model and vision tower: forward, backward, generate, save and load."""

import pytest
import torch
from modeling.tiny import CLIP, MIXED_ROWS, SIGLIP, make_batch, num_images, prompts, tiny_model

from modeling_aligngpt import AlignGPTForConditionalGeneration


LANGUAGE_MODELS = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "llama, rope scaling": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "bos_token_id": None},
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
    "gemma": {"model_type": "gemma", "head_dim": 8, "tie_word_embeddings": True},
    "gemma2": {"model_type": "gemma2", "head_dim": 8, "tie_word_embeddings": True, "final_logit_softcapping": 5.0},
    "phi": {"model_type": "phi", "partial_rotary_factor": 0.5},
    "phi3": {"model_type": "phi3"},
    "stablelm": {"model_type": "stablelm", "partial_rotary_factor": 0.25},
    "starcoder2": {"model_type": "starcoder2"},
}
TOWERS = {
    "clip": (CLIP, "default"),
    "siglip": (SIGLIP, "full"),
    "siglip without a pooling head": ({**SIGLIP, "vision_use_head": False}, "full"),
}


def check(model, folder):
    batch = make_batch(MIXED_ROWS)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :-3] = -100  # what is left in front is the gate's prompt
    outputs = model(**batch, labels=labels)
    assert outputs.logits.shape == (*labels.shape, 64)
    assert outputs.align_weights.sum(1).tolist() == pytest.approx([2, 2, 0], abs=1e-5)
    outputs.loss.backward()
    assert torch.isfinite(outputs.loss)
    for part in (model.model.multi_modal_projector, model.model.align_gate, model.model.language_model):
        assert all(torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0 for p in part.parameters() if p.ndim > 1)

    inputs = prompts(MIXED_ROWS)
    search = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    answers = model.generate(**inputs, **search)[:, -4:]
    uncached = model.generate(**inputs, **search, use_cache=False)[:, -4:]
    assert answers.tolist() == uncached.tolist()
    start = 0
    for ids, answer in zip(MIXED_ROWS, answers, strict=True):
        stop = start + num_images(ids)
        single = {**prompts([ids]), **({"pixel_values": inputs["pixel_values"][start:stop]} if stop > start else {})}
        assert model.generate(**single, **search)[0, -4:].tolist() == answer.tolist()
        start = stop

    model.save_pretrained(folder)
    loaded, report = AlignGPTForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_language_models(name, tmp_path):
    check(tiny_model(LANGUAGE_MODELS[name], lm_head_bias=name == "phi"), tmp_path)


@pytest.mark.parametrize("name", TOWERS)
def test_towers(name, tmp_path):
    vision, strategy = TOWERS[name]
    check(tiny_model(vision_config=vision, vision_feature_select_strategy=strategy), tmp_path)
