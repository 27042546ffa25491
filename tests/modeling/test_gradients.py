"""Backward pass: what gets a gradient in which mode, gradient checkpointing, frozen towers."""

import pytest
import torch
from modeling.tiny import MIXED_ROWS, TOP_LEVEL, make_batch, row, tiny_model


def training_batch(rows=MIXED_ROWS):
    batch = make_batch(rows)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :-2] = -100
    return {**batch, "labels": labels}


def gradients(model, batch, **kwargs):
    model.zero_grad()
    loss = model(**batch, **kwargs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("mode", "level", "rows_with_gradient", "gate_has_gradient"),
    [
        ("level", None, [TOP_LEVEL], False),
        ("level", 3, [3], False),
        ("gate", None, list(range(8)), True),
        ("gate", torch.tensor([1, 5, 6]), [1, 5], False),  # the third row has no image
        ("random", None, list(range(8)), True),
        ("local", None, list(range(TOP_LEVEL)), True),
        ("global", None, [TOP_LEVEL], False),
        ("mean", None, list(range(8)), False),
        ("fixed", None, [TOP_LEVEL], False),
    ],
)
def test_which_levels_and_whether_the_gate_are_trained(mode, level, rows_with_gradient, gate_has_gradient):
    model = tiny_model(align_mode=mode)
    _, grads = gradients(model, training_batch(), align_level=level)
    table = grads["model.align_embeddings.weight"].abs().sum(1)
    assert table.nonzero().flatten().tolist() == rows_with_gradient
    gate = [grads[name].abs().sum() for name in grads if "align_gate" in name]
    assert (len(gate) == 4 and all(gate)) if gate_has_gradient else not any(gate)
    assert grads["model.multi_modal_projector.linear_1.weight"].abs().sum() > 0


def test_text_only_batches_train():
    model = tiny_model()
    _, grads = gradients(model, training_batch([row(5, 6, 7, images=0)]))
    assert all(name.startswith(("model.language_model", "lm_head")) for name in grads)


def test_gate_gradient_is_the_finite_difference():
    model = tiny_model().double()
    batch = training_batch()
    batch["pixel_values"] = batch["pixel_values"].double()
    weight = model.model.align_gate.linear_2.weight
    _, grads = gradients(model, batch)
    grad = grads["model.align_gate.linear_2.weight"]
    place, step = divmod(int(grad.abs().argmax()), grad.shape[1]), 1e-2  # the loss is taken in float32
    with torch.no_grad():
        weight[place] += step
        above = model(**batch).loss
        weight[place] -= 2 * step
        below = model(**batch).loss
    assert float((above - below) / (2 * step)) == pytest.approx(float(grad[place]), rel=0.02)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("freeze_tower", [False, True])
def test_gradient_checkpointing_changes_nothing(use_reentrant, freeze_tower):
    model = tiny_model().train()
    model.model.vision_tower.requires_grad_(not freeze_tower)
    batch = training_batch()
    loss, grads = gradients(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert model.is_gradient_checkpointing
    checkpointed_loss, checkpointed = gradients(model, batch)
    torch.testing.assert_close(checkpointed_loss, loss)
    assert checkpointed.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(checkpointed[name], grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_frozen_tower_builds_no_graph(frozen, checkpointing):
    model = tiny_model().train()
    model.model.vision_tower.requires_grad_(not frozen)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    seen = []
    for layer in model.model.vision_tower.encoder.layers:
        layer.mlp.register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    _, grads = gradients(model, training_batch())
    assert len(seen) >= 3 and set(seen) == {not frozen}
    assert any("vision_tower" in name for name in grads) is not frozen
    assert "model.multi_modal_projector.linear_1.weight" in grads  # the rest still trains


def test_images_that_want_a_gradient_get_one_through_a_frozen_tower():
    model = tiny_model()
    model.requires_grad_(False)
    batch = training_batch()
    batch["pixel_values"].requires_grad_()
    model(**batch).loss.backward()
    assert batch["pixel_values"].grad.abs().sum() > 0


def test_evaluation_in_training_leaves_no_graph():
    model = tiny_model()
    with torch.no_grad():
        assert not model(**training_batch()).logits.requires_grad
