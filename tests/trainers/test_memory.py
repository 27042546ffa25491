"""Estimates of memory against what is really there: tensors, optimizer states, what autograd keeps."""

import pytest
import torch
from stage_parts import conversation_rows, pair_rows, settings, to_dataset
from transformers import (
    GemmaConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PhiConfig,
    Qwen2Config,
)

from aligngpt_trainers import (
    AlignGPTInstructConfig,
    AlignGPTInstructTrainer,
    AlignGPTPretrainConfig,
    AlignGPTPretrainTrainer,
)
from aligngpt_trainers.memory import (
    STRATEGIES,
    Batch,
    activation_bytes,
    count_parameters,
    describe_bytes,
    estimate_memory,
    optimizer_bytes,
)


def size(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.fixture(params=["pretrain", "instruct"])
def trainer(request, assembled, tmp_path):
    model, processor = assembled
    if request.param == "pretrain":
        config, kind, rows = AlignGPTPretrainConfig, AlignGPTPretrainTrainer, pair_rows(8)
        more = {}
    else:
        config, kind, rows = AlignGPTInstructConfig, AlignGPTInstructTrainer, conversation_rows(8)
        more = {"allow_unaligned": True}
    args = settings(config, tmp_path, max_steps=1, **more)
    return kind(model, args, to_dataset(rows), processing_class=processor)


def saved_by_autograd(trainer, batch) -> int:
    """Bytes that the forward keeps for the backward, parameters left out."""
    kept = {}
    own = {tensor.untyped_storage().data_ptr() for tensor in [*trainer.model.parameters(), *trainer.model.buffers()]}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    trainer.model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = trainer.compute_loss(trainer.model, dict(batch))
    del loss
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)


def test_weights_gradients_and_states_are_exact(trainer):
    estimate = estimate_memory(trainer.model, Batch(4, 60), checkpointing=False)
    trainer.create_optimizer()
    before = size([*trainer.model.parameters(), *trainer.model.buffers()])
    trainer.train()
    # gradients are given up after a step: made once more
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    trainer.compute_loss(trainer.model, batch).backward()
    gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    assert estimate.weights == before
    assert estimate.gradients == size(gradients)
    assert estimate.optimizer == size(states)
    assert estimate.total > estimate.weights + estimate.gradients + estimate.optimizer


def test_activations_are_those_that_autograd_keeps(trainer):
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    measured = saved_by_autograd(trainer, batch)
    rows, length = batch["input_ids"].shape
    supervised = int((batch["labels"] != -100).sum())
    shape = Batch(rows, length, len(batch["pixel_values"]), supervised)
    estimate = estimate_memory(trainer.model, shape, checkpointing=False)
    # the head's tiles and the tower's layer come and go, which autograd does not see
    assert 0.85 < estimate.activations / measured < 1.05
    assert measured < estimate.activations + estimate.head + estimate.images


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("trains", [True, False])
def test_activations_of_a_language_model(trains, autocast):
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=72,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).model.requires_grad_(trains).train()
    kept, own = {}, {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    embeds = torch.randn(2, 24, 32, requires_grad=True)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None),
    ):
        model(inputs_embeds=embeds, use_cache=False)
    measured = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)
    counted = activation_bytes(config, Batch(2, 24), trains=trains, autocast=autocast)
    assert abs(counted / measured - 1) < (0.001 if autocast is None else 0.1)


@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig, Qwen2Config, GemmaConfig, PhiConfig])
def test_seven_billion_parameters_take_no_memory_to_estimate(kind):
    config = kind()
    saved = activation_bytes(config, Batch(16, 2048), trains=True, autocast=torch.bfloat16)
    checkpointed = activation_bytes(config, Batch(16, 2048), trains=True, autocast=torch.bfloat16, checkpointing=True)
    layers = config.num_hidden_layers
    # each layer's input and a few times as much within it
    inputs = 4 * 16 * 2048 * config.hidden_size * layers
    assert inputs < checkpointed < saved < 40 * inputs
    half = activation_bytes(config, Batch(8, 2048), trains=True, autocast=torch.bfloat16)
    assert 0.45 < half / saved < 0.6


def test_sharing_divides_what_it_should(trainer):
    batch, model = Batch(4, 60), trainer.model
    found = {
        strategy: estimate_memory(
            model, batch, strategy=strategy, num_devices=1 if strategy == "none" else 4, autocast=torch.bfloat16
        )
        for strategy in STRATEGIES
    }
    one = found["none"]
    assert found["ddp"].weights == one.weights and found["ddp"].sharing == one.gradients
    assert found["fsdp2"].weights == one.weights // 4 and found["fsdp2"].optimizer == one.optimizer // 4
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # two bytes of gradient, and a float32 copy beside both moments, over four devices
    assert found["zero2"].gradients == 2 * trained // 4
    assert found["zero2"].optimizer == (one.optimizer + 4 * trained) // 4
    assert found["zero2"].weights <= one.weights and found["zero3"].weights == found["zero2"].weights // 4
    assert len({estimate.activations for estimate in found.values()}) == 1
    with pytest.raises(ValueError, match="does not go with 4 devices"):
        estimate_memory(model, batch, num_devices=4)
    with pytest.raises(ValueError, match="strategy='zero9' is not one of"):
        estimate_memory(model, batch, strategy="zero9")


def test_optimizers(assembled):
    model = assembled[0].requires_grad_(True)
    numbers = sum(p.numel() for p in model.parameters())
    tensors = len(list(model.parameters()))
    assert optimizer_bytes(model) == optimizer_bytes(model, "adamw_torch_fused") == 8 * numbers + 4 * tensors
    assert optimizer_bytes(model, "sgd") == 0 and optimizer_bytes(model, "paged_adamw_8bit") == 2 * numbers


def test_parts_and_their_parameters(trainer):
    parts = count_parameters(trainer.model)
    whole = {"vision_tower", "multi_modal_projector", "align_embeddings", "align_gate", "language_model", "lm_head"}
    assert set(parts) == whole
    assert sum(part["all"] for part in parts.values()) == sum(p.numel() for p in trainer.model.parameters())
    assert sum(part["trained"] for part in parts.values()) == trainer.trained_parameters()
    assert parts["vision_tower"]["trained"] == 0 < parts["multi_modal_projector"]["trained"]


def test_bytes_are_written_readably():
    shown = [describe_bytes(number) for number in (0, 512, 1536, 3 * 2**20, 2.5 * 2**30, 2**42)]
    assert shown == ["0 B", "512 B", "1.5 KiB", "3.0 MiB", "2.5 GiB", "4.0 TiB"]
