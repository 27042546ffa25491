"""Stage 2 (language model, projector and gate trained): every recorded batch, against the authors' code."""

import pytest
import torch
from parity.checks import assert_same_embeddings, assert_same_gate, assert_same_logits, assert_same_rows
from parity.golden import (
    AFTER_TOLERANCE,
    GRAD_TOLERANCE,
    IGNORED,
    TENSOR_FILES,
    assert_close,
    cut_labels,
    in_their_order,
    original_value,
    original_vocabulary,
    our_batch,
    read,
    read_json,
    set_trainable,
    train,
    watch,
)


BATCHES = [name for name in TENSOR_FILES if name.startswith("stage2_") and "after" not in name]
TRAINED = "stage2_mixed"


@pytest.fixture(scope="module")
def facts():
    return read_json("stage2_training")


@pytest.mark.parametrize("name", BATCHES)
def test_forward_and_loss(name, stage2_model):
    tensors = read(name)
    batch = our_batch(tensors, stage2_model.config)
    assert_same_rows(batch, tensors)
    with torch.no_grad(), watch(stage2_model) as seen, original_vocabulary(stage2_model):
        outputs = stage2_model(**batch.inputs(), labels=cut_labels(batch, tensors))
    assert_same_gate(seen, outputs.align_weights, batch, tensors)
    assert_same_embeddings(seen, tensors)
    assert_same_logits(outputs.logits, tensors)
    assert_close(outputs.loss, tensors["loss"], "loss")


def test_supervised_tokens(stage2_model):
    for name in BATCHES:
        tensors, info = read(name), read_json(name)["info"]
        batch = our_batch(tensors, stage2_model.config)
        assert batch.input_ids.shape[1] >= info["out_len"] == tensors["out_labels"].shape[1]
        labels = in_their_order(cut_labels(batch, tensors), tensors, IGNORED)
        assert (labels != IGNORED).sum(1).tolist() == info["supervised_tokens"], name


def test_gradients(stage2_model, facts):
    tensors = read(TRAINED)
    set_trainable(stage2_model, facts["trainable"])
    batch = our_batch(tensors, stage2_model.config)
    with original_vocabulary(stage2_model):
        stage2_model(**batch.inputs(), labels=cut_labels(batch, tensors)).loss.backward()
    gradients = {name: p.grad for name, p in stage2_model.named_parameters() if p.grad is not None}
    recorded = [name for name in tensors if name.startswith("grad.")]
    assert recorded
    for name in recorded:
        assert_close(original_value(name.removeprefix("grad."), gradients), tensors[name], name, GRAD_TOLERANCE)
    assert not any("align_embeddings" in name or "vision_tower" in name for name in gradients)


def test_five_steps(stage2_model, facts):
    frozen = {
        name: p.clone()
        for name, p in stage2_model.named_parameters()
        if "vision_tower" in name or "align_embeddings" in name
    }
    steps = len(facts["grad_norms"])
    batch = our_batch(read(TRAINED), stage2_model.config)
    losses, grad_norms = train(stage2_model, batch, facts["trainable"], learning_rate=1e-4, steps=steps)
    assert_close(torch.tensor(losses), torch.tensor(facts["losses"]), "loss")
    assert_close(torch.tensor(grad_norms), torch.tensor(facts["grad_norms"]), "grad_norms", 1e-4)
    values = dict(stage2_model.named_parameters())
    for name, theirs in read("stage2_after5").items():
        assert_close(original_value(name.removeprefix("after."), values), theirs, name, AFTER_TOLERANCE)
    assert all(torch.equal(values[name], value) for name, value in frozen.items())
