"""Stage 2: what moves in each alignment mode, what the gate may read, resuming, and the order of the stages."""

import json
import shutil

import pytest
import torch
from stage_parts import conversation_rows, losses, message, moved, settings, snapshot, to_dataset
from transformers import set_seed

from aligngpt_trainers import AlignGPTInstructConfig, AlignGPTInstructTrainer
from modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor


ALWAYS = {"language_model", "lm_head", "multi_modal_projector"}


def trainer_for(model, folder, rows, processor=None, **overrides) -> AlignGPTInstructTrainer:
    args = settings(AlignGPTInstructConfig, folder, **overrides)
    return AlignGPTInstructTrainer(model, args, rows, processing_class=processor)


def test_the_papers_settings_are_the_defaults(tmp_path):
    args = AlignGPTInstructConfig(str(tmp_path), use_cpu=True)
    assert (args.learning_rate, args.lr_scheduler_type, args.warmup_steps, args.weight_decay) == (
        2e-5,
        "cosine",
        0.03,
        0,
    )
    assert (args.num_train_epochs, args.max_length, args.image_aspect_ratio) == (1, 2048, "pad")
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps * 8 == 128
    assert (args.align_mode, args.gate_context, args.allow_unaligned) == ("gate", None, False)


@pytest.mark.parametrize("mode", ["gate", "local", "global", "mean", "fixed", "random"])
def test_what_trains_in_each_mode(stage1_folder, conversations, tmp_path, mode):
    level = {"default_align_level": 1} if mode == "fixed" else {}
    trainer = trainer_for(str(stage1_folder), tmp_path, conversations, align_mode=mode, **level)
    before = snapshot(trainer.model)
    trainer.train()
    gate = {"align_gate"} if mode in ("gate", "local", "random") else set()
    assert moved(before, trainer.model) == ALWAYS | gate
    every_name = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    changed = {name for name, tensor in trainer.model.state_dict().items() if not torch.equal(before[name], tensor)}
    assert changed == every_name
    trainer.save_final()
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["align_mode"], config["training_stage"]) == (mode, "instruct")
    assert config.get("default_align_level") == level.get("default_align_level")
    assert AlignGPTProcessor.from_pretrained(tmp_path).image_processor.do_pad is True


def test_random_draws_the_table_afresh_and_reproducibly(stage1_folder, conversations, tmp_path):
    trained = AlignGPTForConditionalGeneration.from_pretrained(stage1_folder).model.align_embeddings.weight
    tables = [
        trainer_for(
            str(stage1_folder), tmp_path, conversations, align_mode="random", seed=seed
        ).model.model.align_embeddings.weight
        for seed in (1, 1, 2)
    ]
    assert torch.equal(tables[0], tables[1])
    assert not torch.isclose(tables[0], tables[2]).any() and not torch.isclose(tables[0], trained).any()
    bound = (6 / sum(trained.shape)) ** 0.5  # as a fresh table starts
    assert 0.9 * bound < float(tables[0].abs().max()) <= bound


def test_learns(stage1_folder, tmp_path):
    rows = to_dataset(conversation_rows(8))
    trainer = trainer_for(str(stage1_folder), tmp_path, rows, max_steps=30, per_device_train_batch_size=8)
    trainer.train()
    assert losses(trainer)[-1] < 0.3 * losses(trainer)[0]


def test_the_loss_is_the_models_own(stage1_folder, conversations, tmp_path):
    trainer = trainer_for(str(stage1_folder), tmp_path, conversations)
    batch = trainer.data_collator(conversation_rows(6))
    own = trainer.model(**batch).loss
    torch.testing.assert_close(trainer.compute_loss(trainer.model, dict(batch)), own, rtol=0, atol=1e-6)


@pytest.mark.parametrize("context", [None, "first_turn", "sequence"])
def test_the_gate_reads_answers_in_sequence_context_alone(stage1_folder, conversations, tmp_path, context):
    trainer = trainer_for(str(stage1_folder), tmp_path, conversations, gate_context=context)
    weights = []
    for answer in ("red", "not at all green"):
        row = conversation_rows(1)[0]
        row["messages"][1] = message("assistant", answer)
        batch = trainer.data_collator([row])
        batch.pop("labels")
        weights.append(trainer.model.base_model(**batch).align_weights)
    assert torch.equal(*weights) == (context != "sequence")
    wanted = context or "first_turn"
    assert trainer.model.config.gate_context == wanted


def test_the_gate_weighs_in_training_as_in_generation(stage1_folder, conversations, tmp_path):
    """The prompt's weights are the same with the answer behind it (training) and without (inference)."""
    trainer = trainer_for(str(stage1_folder), tmp_path, conversations)
    processor, row = trainer.processing_class, conversation_rows(1)[0]
    batch = trainer.data_collator([row])
    first_answer = int((batch["labels"][0] != -100).nonzero()[0])
    prompt = {"input_ids": batch["input_ids"][:, :first_answer], "pixel_values": batch["pixel_values"]}
    trained = trainer.model(**batch).align_weights
    torch.testing.assert_close(trainer.model(**prompt).align_weights, trained, rtol=0, atol=1e-6)
    assert processor.image_processor.do_pad


def test_gradient_accumulation_does_not_change_the_run(stage1_folder, conversations, tmp_path):
    """Of mixed rows: with and without images, with one answer and two."""
    runs = []
    for batch_size, steps in ((8, 1), (2, 4)):
        trainer = trainer_for(
            str(stage1_folder),
            tmp_path / str(steps),
            conversations,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=steps,
            optim="sgd",
            learning_rate=0.1,
            group_by="none",
        )
        trainer.train()
        runs.append((losses(trainer), snapshot(trainer.model)))
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=0, atol=2e-5)
    for name, tensor in runs[0][1].items():
        torch.testing.assert_close(tensor, runs[1][1][name], rtol=0, atol=2e-5)


def test_rows_without_images_train_alone_and_mixed(stage1_folder, tmp_path):
    text = [row for row in conversation_rows(16) if not row["images"]]
    trainer = trainer_for(str(stage1_folder), tmp_path, to_dataset(text), max_steps=2)
    before = snapshot(trainer.model)
    trainer.train()
    assert moved(before, trainer.model) == {"language_model", "lm_head"}
    no_column = to_dataset(text).remove_columns("images")
    trainer = trainer_for(str(stage1_folder), tmp_path, no_column, max_steps=2)
    trainer.train()
    assert len(losses(trainer)) == 2


def test_a_row_weighs_the_same_alone_and_in_a_mixed_batch(stage1_folder, conversations, tmp_path):
    trainer = trainer_for(str(stage1_folder), tmp_path, conversations)
    rows = conversation_rows(4)
    together = trainer.data_collator(rows)
    logits = trainer.model(**together).logits
    for index, row in enumerate(rows):
        alone = trainer.data_collator([row])
        length = alone["input_ids"].shape[1]
        torch.testing.assert_close(trainer.model(**alone).logits[0], logits[index, :length], rtol=1e-4, atol=1e-5)


def test_resuming_is_bit_exact(stage1_folder, conversations, tmp_path):
    run = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "save_total_limit": None}
    run |= {"lr_scheduler_type": "cosine", "projector_learning_rate": 1e-3, "align_mode": "random"}
    straight = trainer_for(str(stage1_folder), tmp_path / "straight", conversations, **run)
    straight.train()
    shutil.copytree(tmp_path / "straight" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    set_seed(99)
    resumed = trainer_for(str(stage1_folder), tmp_path / "resumed", conversations, resume_from_checkpoint="auto", **run)
    resumed.train()
    assert resumed.state.global_step == 6 and losses(straight) == losses(resumed)
    ours = resumed.model.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in straight.model.state_dict().items())


def test_the_projector_can_have_its_own_learning_rate(stage1_folder, conversations, tmp_path):
    trainer = trainer_for(str(stage1_folder), tmp_path, conversations, projector_learning_rate=0.0, weight_decay=0.1)
    before = snapshot(trainer.model)
    trainer.train()
    assert moved(before, trainer.model) == {"language_model", "lm_head", "align_gate"}
    grouped = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) == sum(p.requires_grad for p in trainer.model.parameters())
    decay = {group["weight_decay"] for group in trainer.optimizer.param_groups if group["lr"] == 0.0}
    assert decay == {0.1, 0.0}


def test_a_processor_of_another_tower_is_refused(assembled, conversations, tmp_path):
    model, processor = assembled
    processor.image_processor.crop_size = {"height": 64, "width": 64}
    with pytest.raises(ValueError, match=r"gives images of 64x64, the vision tower takes .*: set size and crop_size"):
        trainer_for(model, tmp_path, conversations, processor)


def test_stage_1_comes_first(assembled, conversations, tmp_path):
    model, processor = assembled
    with pytest.raises(ValueError, match=r"has not been through stage 1.*aligngpt pretrain.*allow_unaligned"):
        trainer_for(model, tmp_path, conversations, processor)
    trainer = trainer_for(model, tmp_path, conversations, processor, allow_unaligned=True, max_steps=1)
    trainer.train()
    assert trainer.model.config.training_stage == "instruct"


def test_levels_and_modes_are_checked(stage1_folder, conversations, tmp_path):
    with pytest.raises(ValueError, match="align_mode='best' is not one of gate"):
        settings(AlignGPTInstructConfig, tmp_path, align_mode="best")
    with pytest.raises(ValueError, match="default_align_level=1 has no effect"):
        settings(AlignGPTInstructConfig, tmp_path, default_align_level=1)
    with pytest.raises(ValueError, match=r"default_align_level=4 is not in 0\.\.3"):
        trainer_for(str(stage1_folder), tmp_path, conversations, align_mode="fixed", default_align_level=4)
