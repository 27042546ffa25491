"""Stage 1 (projector and level table trained): forward, loss, gradients and five steps, against the authors' code."""

import pytest
import torch
from parity.checks import assert_same_embeddings, assert_same_logits, assert_same_rows
from parity.golden import (
    AFTER_TOLERANCE,
    GRAD_TOLERANCE,
    assert_close,
    cut_labels,
    original_value,
    original_vocabulary,
    our_batch,
    read,
    read_json,
    set_trainable,
    train,
    watch,
)


@pytest.fixture(scope="module")
def tensors():
    return read("stage1_forward")


@pytest.fixture(scope="module")
def facts():
    return read_json("stage1_training")


def test_forward_and_loss(stage1_model, tensors):
    batch = our_batch(tensors, stage1_model.config)
    assert_same_rows(batch, tensors)
    with torch.no_grad(), watch(stage1_model) as seen, original_vocabulary(stage1_model):
        outputs = stage1_model(**batch.inputs(), labels=cut_labels(batch, tensors), align_level=tensors["align_ids"])
    (features,), (image_embeds,) = seen.vision_features, seen.image_embeds
    recorded = tensors["vision_features"].shape[0]
    assert_close(features[:recorded], tensors["vision_features"], "vision_features")
    assert_close(image_embeds[:recorded], tensors["image_embeds"], "image_embeds")
    assert_close(outputs.image_hidden_states[:recorded], tensors["image_embeds"], "image_embeds")
    assert not seen.gate_dots, "a level given by hand needs no gate"
    assert_same_embeddings(seen, tensors)
    assert_same_logits(outputs.logits, tensors)
    assert_close(outputs.loss, tensors["loss"], "loss")


def test_a_batch_gives_each_row_what_it_gives_alone(stage1_model, tensors):
    rows = tensors["input_ids"].shape[0]
    batched = our_batch(tensors, stage1_model.config)
    with torch.no_grad():
        together = stage1_model(**batched.inputs(), align_level=tensors["align_ids"]).logits
        for row in range(rows):
            names = ("input_ids", "labels", "attention_mask", "pixel_values")
            single = our_batch({name: tensors[name][row : row + 1] for name in names}, stage1_model.config)
            alone = stage1_model(**single.inputs(), align_level=int(tensors["align_ids"][row])).logits[0]
            assert_close(together[row, : len(alone)], alone, "logits")


def test_gradients(stage1_model, tensors, facts):
    set_trainable(stage1_model, facts["trainable"])
    batch = our_batch(tensors, stage1_model.config)
    with original_vocabulary(stage1_model):
        stage1_model(**batch.inputs(), labels=batch.labels, align_level=tensors["align_ids"]).loss.backward()
    gradients = {name: p.grad for name, p in stage1_model.named_parameters() if p.grad is not None}
    recorded = [name for name in tensors if name.startswith("grad.")]
    assert recorded
    for name in recorded:
        assert_close(original_value(name.removeprefix("grad."), gradients), tensors[name], name, GRAD_TOLERANCE)
    table = gradients["model.align_embeddings.weight"]
    absent = sorted(set(range(len(table))) - set(tensors["align_ids"].tolist()))
    assert torch.count_nonzero(table[absent]) == 0


def test_five_steps(stage1_model, tensors, facts):
    frozen = {name: p.clone() for name, p in stage1_model.named_parameters() if "language_model" in name}
    steps = len(facts["grad_norms"])
    batch = our_batch(tensors, stage1_model.config)
    losses, grad_norms = train(
        stage1_model, batch, facts["trainable"], learning_rate=1e-3, steps=steps, align_level=tensors["align_ids"]
    )
    assert_close(torch.tensor(losses), torch.tensor(facts["losses"]), "loss")
    assert_close(torch.tensor(grad_norms), torch.tensor(facts["grad_norms"]), "grad_norms", 1e-4)
    values = dict(stage1_model.named_parameters())
    after = read("stage1_after5")
    for name, theirs in after.items():
        assert_close(original_value(name.removeprefix("after."), values), theirs, name, AFTER_TOLERANCE)
    assert all(torch.equal(values[name], value) for name, value in frozen.items())
