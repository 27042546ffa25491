"""Stage 1: what moves and what does not, whose gradient lands where, resuming, saving, and what is refused."""

import json
import shutil

import pytest
import torch
from stage_parts import NUM_LEVELS, losses, moved, pair_rows, settings, snapshot, to_dataset
from transformers import set_seed

from aligngpt_trainers import AlignGPTPretrainConfig, AlignGPTPretrainTrainer
from aligngpt_trainers.stage import find_last_checkpoint
from modeling_aligngpt import AlignGPTForConditionalGeneration, AlignGPTProcessor
from modeling_aligngpt.assembly import assemble


def trainer_for(assembled, folder, rows, **overrides) -> AlignGPTPretrainTrainer:
    model, processor = assembled
    args = settings(AlignGPTPretrainConfig, folder, **overrides)
    return AlignGPTPretrainTrainer(model, args, rows, processing_class=processor)


def fresh(parts):
    return assemble(*parts, num_align_levels=NUM_LEVELS, gate_hidden_size=16, seed=0)


def test_the_papers_settings_are_the_defaults(tmp_path):
    args = AlignGPTPretrainConfig(str(tmp_path), use_cpu=True)
    assert (args.learning_rate, args.lr_scheduler_type, args.warmup_steps, args.weight_decay) == (
        1e-3,
        "cosine",
        0.03,
        0,
    )
    assert (args.num_train_epochs, args.max_length, args.image_aspect_ratio, args.bf16) == (1, 2048, "square", False)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps * 8 == 256
    assert args.report_to == [] and not args.push_to_hub and args.gradient_checkpointing


def test_trains_projector_and_levels_alone(assembled, pairs, tmp_path):
    trainer = trainer_for(assembled, tmp_path, pairs)
    before = snapshot(trainer.model)
    trainer.train()
    assert moved(before, trainer.model) == {"multi_modal_projector", "align_embeddings"}
    expected = sum(before[name].numel() for name in before if "projector" in name or "align_embeddings" in name)
    assert trainer.trained_parameters() == expected
    assert trainer.model.config.align_mode == "level" and trainer.model.config.training_stage == "pretrain"
    assert assembled[1].image_processor.do_pad is False


def test_a_rows_level_trains_its_row_of_the_table_alone(assembled, tmp_path):
    rows = [{**row, "align_level": 1 + 2 * (i % 2)} for i, row in enumerate(pair_rows(8))]
    trainer = trainer_for(assembled, tmp_path, to_dataset(rows))
    before = snapshot(trainer.model)["model.align_embeddings.weight"]
    batch = trainer.data_collator([{**rows[0], "align_level": 2}])
    trainer.compute_loss(trainer.model.train(), batch).backward()
    gradient = trainer.model.model.align_embeddings.weight.grad
    assert gradient[2].abs().sum() > 0
    assert not gradient[[0, 1, 3]].any()
    trainer.model.zero_grad()
    trainer.train()
    after = trainer.model.model.align_embeddings.weight
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert (before[1] != after[1]).any() and (before[3] != after[3]).any()


def test_the_level_changes_the_loss(assembled, pairs, tmp_path):
    trainer = trainer_for(assembled, tmp_path, pairs)
    found = set()
    for level in range(NUM_LEVELS):
        batch = trainer.data_collator([{**pair_rows(1)[0], "align_level": level}])
        found.add(trainer.compute_loss(trainer.model, batch).item())
    assert len(found) == NUM_LEVELS


def test_the_loss_is_the_models_own(assembled, pairs, tmp_path):
    trainer = trainer_for(assembled, tmp_path, pairs)
    batch = trainer.data_collator(pair_rows(5))
    own = trainer.model(**batch).loss
    torch.testing.assert_close(trainer.compute_loss(trainer.model, dict(batch)), own, rtol=0, atol=1e-6)


def test_gradient_accumulation_does_not_change_the_run(parts, pairs, tmp_path):
    """Rows have different numbers of supervised tokens, so a mean of means would differ."""
    runs = []
    for batch_size, steps in ((8, 1), (2, 4)):
        trainer = trainer_for(
            fresh(parts),
            tmp_path / str(steps),
            pairs,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=steps,
            optim="sgd",
            learning_rate=0.5,
        )
        trainer.train()
        runs.append((losses(trainer), snapshot(trainer.model)))
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=0, atol=2e-5)
    for name, tensor in runs[0][1].items():
        torch.testing.assert_close(tensor, runs[1][1][name], rtol=0, atol=2e-5)


def test_gradient_checkpointing_does_not_change_the_run(parts, pairs, tmp_path):
    runs = []
    for checkpointing in (False, True):
        folder = tmp_path / str(checkpointing)
        trainer = trainer_for(fresh(parts), folder, pairs, gradient_checkpointing=checkpointing)
        trainer.train()
        runs.append(snapshot(trainer.model))
    assert all(torch.equal(tensor, runs[1][name]) for name, tensor in runs[0].items())


def test_resuming_is_bit_exact(parts, pairs, tmp_path):
    run = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "save_total_limit": None,
        "dataloader_num_workers": 0,
    }
    straight = trainer_for(fresh(parts), tmp_path / "straight", pairs, lr_scheduler_type="cosine", **run)
    straight.train()
    shutil.copytree(tmp_path / "straight" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    set_seed(1234)  # whatever state the new process is in must not matter
    resumed = trainer_for(
        fresh(parts), tmp_path / "resumed", pairs, lr_scheduler_type="cosine", resume_from_checkpoint="auto", **run
    )
    resumed.train()
    assert resumed.state.global_step == 6 and resumed.resumed_from.endswith("checkpoint-3")
    assert losses(straight) == losses(resumed)
    ours = resumed.model.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in straight.model.state_dict().items())


def test_auto_starts_afresh_without_a_checkpoint_and_passes_over_incomplete_ones(assembled, pairs, tmp_path):
    (tmp_path / "checkpoint-9").mkdir()
    assert find_last_checkpoint(tmp_path) is None
    trainer = trainer_for(assembled, tmp_path, pairs, resume_from_checkpoint="auto", max_steps=1)
    trainer.train()
    assert trainer.resumed_from is None and trainer.state.global_step == 1


def test_saves_a_complete_repository(assembled, pairs, tmp_path):
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"of an earlier run")
    trainer = trainer_for(assembled, tmp_path, pairs)
    trainer.train()
    summary = trainer.save_final({"sources": {"dataset": "pairs"}})
    names = {path.name for path in tmp_path.iterdir()}
    assert {"model.safetensors", "config.json", "modeling_aligngpt.py", "processing_aligngpt.py"} <= names
    assert {"configuration_aligngpt.py", "processor_config.json", "tokenizer.json", "chat_template.jinja"} <= names
    assert not names & {"unfinished", "training_args.bin", "model-00001-of-00002.safetensors"}
    assert json.loads((tmp_path / "training_summary.json").read_text()) == summary
    assert summary["steps"] == 3 and summary["train_rows"] == len(pairs) and summary["stage"] == "pretrain"
    assert [step for step, _ in summary["loss_curve"]] == [1, 2, 3]
    assert summary["loss_curve"][-1][1] == summary["loss_last"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert "AutoModelForImageTextToText" in config["auto_map"] and config["training_stage"] == "pretrain"
    model = AlignGPTForConditionalGeneration.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in trainer.model.state_dict().items())
    processor = AlignGPTProcessor.from_pretrained(tmp_path)
    # stage 1 trains with the plain template; the saved one is the language model's conversation
    assert "ASSISTANT:" in processor.chat_template and processor.image_processor.do_pad is False


def test_what_a_save_needs_is_proved_before_the_first_step(assembled, pairs, tmp_path):
    model, _ = assembled
    model.generation_config.temperature = 0.9  # without do_sample: transformers refuses to save it
    trainer = trainer_for(assembled, tmp_path, pairs)
    assert model.generation_config.temperature is None
    trainer.train()
    trainer.save_final()
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert "temperature" not in saved and saved["max_new_tokens"] == 1024
    model.generation_config.num_return_sequences = 3
    with pytest.raises(ValueError, match=r"could not be saved after training: .*`num_return_sequences`"):
        trainer_for(assembled, tmp_path, pairs)


def test_saving_again_replaces_the_first_save(assembled, pairs, tmp_path):
    trainer = trainer_for(assembled, tmp_path, pairs, max_steps=1)
    for _ in range(2):
        trainer.train()
        trainer.save_final()
    saved = AlignGPTForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in trainer.model.state_dict().items())


def test_evaluates(assembled, pairs, tmp_path):
    model, processor = assembled
    args = settings(AlignGPTPretrainConfig, tmp_path, eval_strategy="steps", eval_steps=3)
    trainer = AlignGPTPretrainTrainer(
        model, args, pairs, eval_dataset=pairs.select(range(4)), processing_class=processor
    )
    trainer.train()
    assert trainer.summary()["eval"][0]["eval_loss"] > 0


def test_streams(assembled, pairs, tmp_path):
    streamed = pairs.to_iterable_dataset()
    trainer = trainer_for(assembled, tmp_path, streamed)
    trainer.train()
    assert len(losses(trainer)) == 3
    bad = to_dataset([*pair_rows(2), {**pair_rows(1)[0], "align_level": NUM_LEVELS}]).to_iterable_dataset()
    with pytest.raises(ValueError, match=f"Row 2 has align_level={NUM_LEVELS}"):
        trainer_for(assembled, tmp_path, bad).train()


def test_a_bad_row_stops_the_run_before_its_first_step(assembled, tmp_path):
    rows = pair_rows(8)
    rows[6]["align_level"] = None
    with pytest.raises(ValueError, match=r"Row 6 has no `align_level`.*aligngpt score"):
        trainer_for(assembled, tmp_path, to_dataset(rows))
    no_column = to_dataset([{k: v for k, v in row.items() if k != "align_level"} for row in pair_rows(3)])
    with pytest.raises(ValueError, match=r"Row 0 has no `align_level`.*aligngpt score"):
        trainer_for(assembled, tmp_path, no_column)
    with pytest.raises(ValueError, match=r"Row \d has no `align_level`"):
        trainer_for(assembled, tmp_path, no_column, check_rows=False).train()


def test_overlong_rows_are_refused_dropped_or_cut_and_counted(assembled, tmp_path):
    rows = pair_rows(8)
    rows[3]["messages"][1]["content"][0]["text"] = "a very long caption " * 20
    dataset = to_dataset(rows)
    with pytest.raises(ValueError, match=r"Row 3 has \d+ tokens.*max_length=40"):
        trainer_for(assembled, tmp_path, dataset, max_length=40)
    dropped = trainer_for(assembled, tmp_path, dataset, max_length=40, on_overlong="drop")
    assert dropped.row_counts["train_rows"] == 7 and dropped.row_counts["train_rows_left_out"] == 1
    assert dropped.train_dataset["row_index"][:] == [0, 1, 2, 4, 5, 6, 7]
    cut = trainer_for(assembled, tmp_path, dataset, max_length=40, on_overlong="truncate", max_steps=2)
    assert cut.row_counts["train_rows"] == 8 and cut.row_counts["train_rows_cut"] == 1
    cut.train()
    with pytest.raises(ValueError, match="No row of the train data fits"):
        trainer_for(assembled, tmp_path, dataset, max_length=5, on_overlong="drop")


def test_shuffled_and_selected_data_train(assembled, pairs, tmp_path):
    trainer = trainer_for(assembled, tmp_path, pairs.shuffle(seed=1).select(range(8)))
    trainer.train()
    assert trainer.row_counts["train_rows"] == 8


def test_settings_without_effect_and_wrong_data_are_refused(assembled, pairs, tmp_path):
    for name, value in (("assistant_only_loss", False), ("packing", True), ("padding_free", True)):
        with pytest.raises(ValueError, match=f"{name}={value} has no effect"):
            settings(AlignGPTPretrainConfig, tmp_path, **{name: value})
    with pytest.raises(ValueError, match="needs check_rows=True"):
        settings(AlignGPTPretrainConfig, tmp_path, on_overlong="drop", check_rows=False)
    with pytest.raises(ValueError, match="image_aspect_ratio='stretch'"):
        settings(AlignGPTPretrainConfig, tmp_path, image_aspect_ratio="stretch")
    with pytest.raises(ValueError, match="no `messages` column but images"):
        trainer_for(assembled, tmp_path, pairs.select_columns(["images"]))
    with pytest.raises(ValueError, match="is empty"):
        trainer_for(assembled, tmp_path, pairs.select([]))
    with pytest.raises(ValueError, match="is a list"):
        trainer_for(assembled, tmp_path, pair_rows(2))


def test_frozen_weights_may_be_bfloat16(parts, pairs, tmp_path):
    model, processor = assemble(*parts, num_align_levels=NUM_LEVELS, gate_hidden_size=16, dtype=torch.bfloat16)
    trainer = trainer_for((model, processor), tmp_path, pairs, bf16=True)
    trainer.train()
    kinds = {parameter.requires_grad: parameter.dtype for parameter in model.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    trainer.save_final()
    saved = AlignGPTForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    levels = model.model.align_embeddings.weight
    assert torch.equal(saved.model.align_embeddings.weight, levels)
    inputs = {k: v for k, v in trainer.data_collator(pair_rows(2)).items() if k != "labels"}
    assert saved.generate(**inputs, max_new_tokens=2).shape[0] == 2


def test_the_penalty_is_the_mean_squared_logarithm_of_the_tokens_length(assembled, pairs, tmp_path):
    trainer = trainer_for(assembled, tmp_path, pairs, image_token_penalty=0.5)
    model = trainer.model.train()
    batch = trainer.data_collator(pair_rows(5))
    plain = model(**batch)
    words = model.get_input_embeddings().weight.norm(dim=-1).mean()
    scale = plain.image_hidden_states.norm(dim=-1) / words
    expected = plain.loss + 0.5 * scale.log().square().mean()
    torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), expected, rtol=0, atol=1e-5)
    # an evaluation is of the texts alone
    own = trainer.compute_loss(model.eval(), dict(batch))
    torch.testing.assert_close(own, plain.loss, rtol=0, atol=1e-6)


def test_the_penalty_brings_image_tokens_to_the_length_of_words(parts, pairs, tmp_path):
    scales = {}
    for weight in (0.0, 1.0):
        assembled = fresh(parts)
        with torch.no_grad():
            assembled[0].model.multi_modal_projector.linear_2.weight.mul_(30)
        rates = {"learning_rate": 5e-2, "max_steps": 12}
        trainer = trainer_for(assembled, tmp_path / str(weight), pairs, image_token_penalty=weight, **rates)
        trainer.train()
        logged = [log["image_token_scale"] for log in trainer.state.log_history if "image_token_scale" in log]
        assert bool(logged) == bool(weight)
        batch = trainer.data_collator(pair_rows(5))
        with torch.no_grad():
            tokens = trainer.model.eval()(**batch).image_hidden_states
        words = trainer.model.get_input_embeddings().weight.norm(dim=-1).mean()
        scales[weight] = (tokens.norm(dim=-1) / words).log().abs().mean().item()
    assert scales[1.0] < scales[0.0] - 1, scales


def test_the_penalty_does_not_depend_on_accumulation(parts, pairs, tmp_path):
    found = []
    for batch, steps in ((4, 1), (2, 2)):
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps, "max_steps": 3}
        trainer = trainer_for(fresh(parts), tmp_path / str(batch), pairs, image_token_penalty=0.3, **sizes)
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == pytest.approx(found[1], abs=2e-4)
