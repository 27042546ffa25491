"""Batches of similar rows: each row once, little padding, one modality, the same order again, in one process or two."""

import math

import numpy as np
import pytest
import torch
from stage_parts import conversation_rows, message, settings, to_dataset
from torch.utils.data import BatchSampler

from aligngpt_trainers import AlignGPTInstructConfig, AlignGPTInstructTrainer
from aligngpt_trainers.sampling import GroupedSampler, make_sampler


ROWS, BATCH = 500, 4


def padding_waste(lengths, order, batch_size: int) -> float:
    """Share of padding in the batches that an order of rows gives, from 0 to 1."""
    ordered = np.asarray(lengths)[list(order)]
    batches = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    padded = sum(int(batch.max()) * len(batch) for batch in batches)
    return 1 - int(ordered.sum()) / padded if padded else 0.0


@pytest.fixture
def lengths():
    return np.random.default_rng(0).lognormal(4, 0.8, ROWS).astype(int) + 5


@pytest.fixture
def has_images():
    return np.random.default_rng(1).random(ROWS) < 0.7


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("mixed", [True, False])
def test_every_row_once_an_epoch(lengths, has_images, world_size, mixed):
    sampler = GroupedSampler(lengths, BATCH, world_size, has_images if mixed else None)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert sorted(order) == list(range(ROWS)) and len(sampler) == ROWS
        orders.append(order)
    assert orders[0] != orders[1] != orders[2]


def test_less_padding_than_at_random(lengths, has_images):
    random_waste = padding_waste(lengths, np.random.default_rng(0).permutation(ROWS), BATCH)
    by_length = padding_waste(lengths, list(GroupedSampler(lengths, BATCH)), BATCH)
    by_both = padding_waste(lengths, list(GroupedSampler(lengths, BATCH, 1, has_images)), BATCH)
    assert by_length < 0.2 * random_waste and by_both < 0.3 * random_waste
    assert padding_waste([3, 1, 2, 2], [0, 1, 2, 3], 2) == pytest.approx(1 - 8 / 10)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_processes_have_the_same_modality_at_the_same_step(lengths, has_images, world_size):
    sampler = GroupedSampler(lengths, BATCH, world_size, has_images)
    modality = has_images[list(sampler)]
    steps = [modality[start : start + BATCH * world_size] for start in range(0, ROWS, BATCH * world_size)]
    mixed = [step for step in steps if len(set(step)) > 1]
    # only what fills no block, at the end: at most two blocks of it
    assert len(mixed) <= 2 and all(len(set(step)) == 1 for step in steps[:-2])
    batches = [modality[start : start + BATCH] for start in range(0, ROWS, BATCH)]
    assert sum(len(set(batch)) > 1 for batch in batches) <= 1
    whole = GroupedSampler(lengths, BATCH, world_size, has_images, drop_last=True)
    order = list(whole)
    assert len(order) == len(whole) and len(set(order)) == len(order)
    for start in range(0, len(order), BATCH * world_size):
        assert len(set(has_images[order[start : start + BATCH * world_size]])) == 1


def test_the_longest_row_comes_first_and_the_order_is_that_of_seed_and_epoch(lengths, has_images):
    def order(seed: int, epoch: int) -> list[int]:
        sampler = GroupedSampler(lengths, BATCH, 2, has_images, seed)
        sampler.set_epoch(epoch)
        torch.manual_seed(np.random.randint(1000))  # the global state must not matter
        return list(sampler)

    first = order(3, 0)
    in_blocks = first[: len(GroupedSampler(lengths, BATCH, 2, has_images, 3, drop_last=True))]
    assert lengths[first[: 2 * BATCH]].max() == lengths[in_blocks].max()
    assert first == order(3, 0) and first != order(3, 1) and first != order(4, 0)
    assert order(3, 1) == order(4, 0)


def test_accelerate_gives_each_process_its_part_of_a_block(lengths, has_images):
    from accelerate.data_loader import BatchSamplerShard

    sampler = GroupedSampler(lengths, BATCH, 2, has_images)
    shards = [list(BatchSamplerShard(BatchSampler(sampler, BATCH, False), 2, rank)) for rank in range(2)]
    assert len(shards[0]) == len(shards[1]) == math.ceil(ROWS / BATCH / 2)
    for first, second in list(zip(*shards, strict=True))[:-2]:
        assert len({bool(has_images[row]) for row in first + second}) == 1
    # the last step is filled up from the beginning
    assert {row for batch in shards[0] + shards[1] for row in batch} == set(range(ROWS))


@pytest.mark.parametrize("number", [1, 3, 4, 7])
def test_little_data(number):
    sampler = GroupedSampler(list(range(1, number + 1)), BATCH, 1, [index % 2 for index in range(number)])
    assert sorted(sampler) == list(range(number))


def test_the_trainer_groups_by_modality_and_length(stage1_folder, tmp_path):
    rows = conversation_rows(24)
    for index in range(0, 24, 4):
        rows[index]["messages"][1] = message("assistant", "a long answer of many words indeed " * (1 + index % 5))
    trainer = AlignGPTInstructTrainer(
        str(stage1_folder),
        settings(AlignGPTInstructConfig, tmp_path, max_steps=-1, num_train_epochs=1),
        to_dataset(rows),
    )
    assert trainer.args.group_by == "modality_length"
    seen = []
    for batch in trainer.get_train_dataloader():
        seen += batch["row_index"].tolist()
        images = (batch["input_ids"] == trainer.model.config.image_token_id).any(1)
        assert images.all() or not images.any() or len(seen) > 20
    assert sorted(seen) == list(range(24))
    trainer.train()
    summary = trainer.summary()
    assert 0 < summary["padding_waste"] < 0.5
    lengths = trainer.train_dataset["length"]
    expected = padding_waste(lengths, seen, 4)
    assert summary["padding_waste"] == pytest.approx(expected, abs=1e-4)
    assert summary["positions"] == round(sum(lengths) / (1 - expected))


def test_without_lengths_a_warning_says_so(stage1_folder, conversations, tmp_path, caplog):
    for rows, words in ((conversations, "check_rows"), (conversations.to_iterable_dataset(), "streamed")):
        with_checks = {"check_rows": False} if words == "check_rows" else {}
        args = settings(AlignGPTInstructConfig, tmp_path, **with_checks)
        trainer = AlignGPTInstructTrainer(str(stage1_folder), args, rows)
        caplog.clear()
        assert make_sampler(trainer.train_dataset, "modality_length", 2, 1, 0, False) is None
        assert "group_by=modality_length has no effect" in caplog.text and words in caplog.text


def test_two_samplers_at_once_are_refused(tmp_path):
    with pytest.raises(ValueError, match="group_by='quality' is not one of none, length, modality_length"):
        settings(AlignGPTInstructConfig, tmp_path, group_by="quality")
    with pytest.raises(ValueError, match="both choose the batches: set group_by to none"):
        settings(AlignGPTInstructConfig, tmp_path, train_sampling_strategy="group_by_length")
    args = settings(AlignGPTInstructConfig, tmp_path, train_sampling_strategy="sequential", group_by="none")
    assert args.train_sampling_strategy == "sequential"
