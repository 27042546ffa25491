"""The dummy image of a process without images; two real processes meet in the tests of the trainers."""

import pytest
import torch
from modeling.test_gradients import gradients, training_batch
from modeling.tiny import MIXED_ROWS, SIGLIP, TOP_LEVEL, make_batch, prompts, row
from modeling.tiny import tiny_model as bare_model
from safetensors.torch import load_file
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from aligngpt_trainers.dummy_image import DummyImageCallback, add_dummy_images
from modeling_aligngpt import ALIGN_MODES


TEXT_ROWS = [row(5, 6, 7, 8, images=0), row(9, 10, images=0)]


def tiny_model(**kwargs):
    model = bare_model(**kwargs)
    add_dummy_images(model)
    return model


@pytest.fixture
def two_processes():
    """This process as one of two, by torch's process group that answers without a second."""
    distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    distributed.destroy_process_group()


def tower_runs(model) -> list:
    calls = []
    model.model.multi_modal_projector.register_forward_hook(lambda *_: calls.append("projector"))
    model.model.align_gate.register_forward_hook(lambda *_: calls.append("gate"))
    model.model.align_embeddings.register_forward_hook(lambda *_: calls.append("table"))
    model.model.vision_tower.register_forward_hook(lambda *_: calls.insert(0, "tower"))
    return calls


@pytest.mark.parametrize("mode", ALIGN_MODES)
@pytest.mark.parametrize("level", [None, 2, torch.tensor([1, 3])], ids=["own mode", "one level", "level a row"])
def test_text_batches_run_what_image_batches_run_and_change_nothing(mode, level, two_processes, request):
    model, batch = tiny_model(align_mode=mode).train(), training_batch(TEXT_ROWS)
    loss, grads = gradients(model, batch, align_level=level)
    calls = tower_runs(model)
    gradients(model, training_batch([row(5, 6), row(7, 8)]), align_level=level)
    with_image = list(calls)
    calls.clear()
    gradients(model, batch, align_level=level)
    assert calls == with_image
    assert ("gate" in calls) is (level is None and mode in ("gate", "local", "random"))
    distributed.destroy_process_group()
    alone_loss, alone = gradients(model, batch, align_level=level)
    distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    assert torch.equal(loss, alone_loss)
    assert all(torch.equal(grads[name], grad) for name, grad in alone.items())
    surplus = {name: grad for name, grad in grads.items() if name not in alone}
    assert any("multi_modal_projector" in name for name in surplus)
    assert any("align_gate" in name for name in surplus) is ("gate" in calls)
    assert "model.align_embeddings.weight" in surplus
    assert all(not grad.any() for grad in surplus.values())


@pytest.mark.parametrize("kwargs", [{"vision_scales": [1, 2]}, {"vision_config": SIGLIP}], ids=["scales", "siglip"])
def test_every_image_side_has_a_dummy(kwargs, two_processes):
    if "vision_config" in kwargs:
        kwargs["vision_feature_select_strategy"] = "full"
    model = tiny_model(**kwargs).train()
    calls = tower_runs(model)
    _, grads = gradients(model, training_batch(TEXT_ROWS))
    assert {"tower", "projector", "gate", "table"} <= set(calls)
    assert len(grads) == sum(p.grad is not None for p in model.parameters())


def test_a_frozen_image_side_stays_without_gradients(two_processes):
    model = tiny_model().train()
    for part in (model.model.vision_tower, model.model.align_embeddings):
        part.requires_grad_(False)
    _, grads = gradients(model, training_batch(TEXT_ROWS))
    assert not any("vision_tower" in name or "align_embeddings" in name for name in grads)


def test_checkpointed_text_batches(two_processes):
    model, batch = tiny_model().train(), training_batch(TEXT_ROWS)
    loss, grads = gradients(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    again, checkpointed = gradients(model, batch)
    assert torch.equal(loss, again) and grads.keys() == checkpointed.keys()


def test_a_tower_that_overflows_leaves_text_alone(two_processes):
    model = tiny_model().train()
    plain = model(**training_batch(TEXT_ROWS)).loss
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.bias.fill_(3e38)  # its sum is infinite
    assert torch.equal(model(**training_batch(TEXT_ROWS)).loss, plain)


def test_no_dummy_where_nobody_waits(two_processes):
    model = tiny_model()
    calls = tower_runs(model)
    model(**make_batch(TEXT_ROWS))  # evaluation of whole weights
    model.train()
    with torch.no_grad():
        model(**make_batch(TEXT_ROWS))
    model.eval().generate(**prompts(TEXT_ROWS), max_new_tokens=3, do_sample=False)
    assert calls == []
    model.train()(**make_batch(MIXED_ROWS))
    assert calls.count("tower") == 1
    distributed.destroy_process_group()
    calls.clear()
    model(**make_batch(TEXT_ROWS))
    distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    assert calls == []


def test_sharded_weights_are_gathered_in_evaluation_too(two_processes):
    model = tiny_model()
    calls = tower_runs(model)
    model.model.multi_modal_projector.linear_1.weight.ds_id = 0  # as ZeRO-3 marks it
    with torch.no_grad():
        outputs = model(**make_batch(TEXT_ROWS))
        assert calls.count("tower") == 1
        # a step behind a cache has no images in any process
        model(input_ids=torch.tensor([[5], [6]]), past_key_values=outputs.past_key_values)
    assert calls.count("tower") == 1
    assert outputs.align_weights.tolist() == [[0.0] * (TOP_LEVEL + 1)] * 2


def test_a_sharded_model_saves_its_own_class_and_code(tmp_path):
    """FSDP2 gives the instance a class of torch's; ZeRO-3's loader leaves renamings: neither reaches the folder."""
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        model = tiny_model()
        whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for layer in model.model.language_model.layers:
            fully_shard(layer)
        fully_shard(model)
        assert type(model).__name__ == "FSDPAlignGPTForConditionalGeneration"
        model._weight_conversions = ["as DeepSpeed's loader leaves it"]
        model.save_pretrained(tmp_path / "saved", state_dict=whole)
        assert type(model).__name__ == "FSDPAlignGPTForConditionalGeneration" and model._weight_conversions
    finally:
        distributed.destroy_process_group()
    tiny_model().save_pretrained(tmp_path / "plain")
    assert {p.name for p in (tmp_path / "saved").iterdir()} == {p.name for p in (tmp_path / "plain").iterdir()}
    for name in ("config.json", "modeling_aligngpt.py"):
        assert (tmp_path / "saved" / name).read_text() == (tmp_path / "plain" / name).read_text()
    saved, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("saved", "plain"))
    assert saved.keys() == plain.keys() and all(torch.equal(saved[name], plain[name]) for name in plain)


def test_only_layers_that_are_there_are_named_for_wrapping():
    """accelerate refuses to wrap a class that the model does not have (CLIP names its text side, too)."""
    model = tiny_model()
    present = {type(module).__name__ for module in model.modules()}
    assert model._no_split_modules and set(model._no_split_modules) <= present
    assert {"LlamaDecoderLayer", "CLIPEncoderLayer"} <= set(model._no_split_modules)


def test_other_trainers_add_it_as_a_callback(two_processes):
    model = bare_model().train()
    calls, callback = tower_runs(model), DummyImageCallback()
    model(**training_batch(TEXT_ROWS))
    assert calls == []
    callback.on_train_begin(None, None, None, model=model)
    model(**training_batch(TEXT_ROWS))
    assert "tower" in calls
    calls.clear()
    model.model(training_batch(TEXT_ROWS)["input_ids"])  # by position
    assert "tower" in calls
    calls.clear()
    callback.on_train_end(None, None, None)
    model(**training_batch(TEXT_ROWS))
    assert calls == []
