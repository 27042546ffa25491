"""Inference: prompt ids, forward pass, gate, greedy and beam search, against the authors' code."""

import pytest
import torch
from parity.checks import assert_same_embeddings, assert_same_gate, assert_same_logits, assert_same_rows
from parity.golden import CLEAR_MARGIN, draw_image, original_vocabulary, our_batch, read, read_json, watch


PROMPTS = {prompt["name"]: prompt for prompt in read_json("inference")}


def _answer(model, batch, length: int, **kwargs) -> list[int]:
    """New tokens of one row, without search settings from anywhere else."""
    generated = model.generate(**batch.inputs(), max_new_tokens=length, do_sample=False, **kwargs)
    return generated[0, batch.input_ids.shape[1] :].tolist()


@pytest.mark.parametrize("name", PROMPTS)
def test_processor_gives_their_ids_and_pixels(name, stage2_model, stage2_processor):
    prompt, tensors = PROMPTS[name], read(f"infer_{name}")
    batch = our_batch(tensors, stage2_model.config)
    images = [draw_image(prompt["image"])] if prompt["image"] else None
    ours = stage2_processor(images=images, text=prompt["prompt"], return_tensors="pt")
    assert torch.equal(ours["input_ids"], batch.input_ids)
    assert torch.equal(ours["attention_mask"], batch.attention_mask)
    if images:
        assert ours["pixel_values"].shape == batch.pixel_values.shape
        assert (ours["pixel_values"] - batch.pixel_values).abs().max() <= 1e-5
    else:
        assert "pixel_values" not in ours


@pytest.mark.parametrize("gate_context", ["prompt", "sequence"])
@pytest.mark.parametrize("name", PROMPTS)
def test_forward(name, gate_context, stage2_model):
    tensors = read(f"infer_{name}")
    stage2_model.config.gate_context = gate_context  # the same here: there is no answer to read
    batch = our_batch(tensors, stage2_model.config)
    assert_same_rows(batch, tensors)
    with torch.no_grad(), watch(stage2_model) as seen:
        outputs = stage2_model(**batch.inputs())
    assert_same_gate(seen, outputs.align_weights, batch, tensors)
    assert_same_embeddings(seen, tensors)
    assert_same_logits(outputs.logits, tensors)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", PROMPTS)
def test_greedy_tokens(name, use_cache, stage2_model):
    prompt, theirs = PROMPTS[name], read(f"infer_{name}")["generated"].tolist()
    clear = next((step for step, margin in enumerate(prompt["margins"]) if margin <= CLEAR_MARGIN), len(theirs))
    batch = our_batch(read(f"infer_{name}"), stage2_model.config)
    with watch(stage2_model) as seen:
        ours = _answer(stage2_model, batch, len(theirs), use_cache=use_cache)
    assert clear > 0
    assert ours[:clear] == theirs[:clear]
    if use_cache:
        assert len(seen.gate_dots) == prompt["gate_calls_with_cache"]


def test_beam_search(stage2_model):
    facts = read_json("beam")
    batch = our_batch(read(f"infer_{facts['prompt']}"), stage2_model.config)
    with original_vocabulary(stage2_model):
        ours = _answer(stage2_model, batch, facts["max_new_tokens"], num_beams=facts["num_beams"])
    assert ours == facts["generated"]
