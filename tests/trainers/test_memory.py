"""Memory on one device against what is really there: tensors, optimizer states, what autograd keeps."""

import pytest
import torch
from stage_parts import conversation_rows, pair_rows, settings, to_dataset

from aligngpt_trainers import (
    AlignGPTInstructConfig,
    AlignGPTInstructTrainer,
    AlignGPTPretrainConfig,
    AlignGPTPretrainTrainer,
)
from aligngpt_trainers.memory import count_parameters, describe_bytes, memory_of, optimizer_bytes, saved_bytes


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


def test_weights_gradients_and_states_are_exact(trainer):
    memory = memory_of(trainer, None)
    before = size([*trainer.model.parameters(), *trainer.model.buffers()])
    trainer.train()
    # gradients are given up after a step: made once more
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    trainer.compute_loss(trainer.model, batch).backward()
    gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    assert memory == {
        "weights": before,
        "gradients": size(gradients),
        "optimizer": size(states),
        "activations": None,
    }


def test_activations_grow_with_rows_and_shrink_with_checkpointing(trainer):
    rows = [trainer.train_dataset[i] for i in range(4)]
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    one, four = (saved_bytes(trainer, trainer.data_collator(rows[:number])) for number in (1, 4))
    assert 2 * one < four
    trainer.args.gradient_checkpointing = True
    assert 0 < saved_bytes(trainer, trainer.data_collator(rows)) < four
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())


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
