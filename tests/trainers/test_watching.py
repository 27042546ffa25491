"""What a run tells on its way: loss by level, the gate by kind of answer, padding, and answers in each tracker."""

import json
import sys
from pathlib import Path

import pytest
import torch
from stage_parts import NUM_LEVELS, conversation_rows, pair_rows, settings, to_dataset

from aligngpt_trainers import (
    AlignGPTInstructConfig,
    AlignGPTInstructTrainer,
    AlignGPTPretrainConfig,
    AlignGPTPretrainTrainer,
)


EVALUATE = {"eval_strategy": "steps", "eval_steps": 2, "eval_generations": 4, "eval_generation_tokens": 8}
WEIGHTS = [f"eval/align_weight_{level}" for level in range(NUM_LEVELS - 1)]


def instruct(model, folder, rows=None, **overrides):
    args = settings(AlignGPTInstructConfig, folder, **{"max_steps": 4, **overrides})
    rows = to_dataset(rows or conversation_rows(8))
    held_out = to_dataset(conversation_rows(8)) if "eval_strategy" in overrides else None
    return AlignGPTInstructTrainer(str(model), args, rows, eval_dataset=held_out)


def test_loss_by_level_adds_up_to_the_loss(stage1_folder, tmp_path):
    """At a rate of zero the model stays: each level's figure is that of its rows alone."""
    args = settings(
        AlignGPTPretrainConfig, tmp_path, max_steps=2, learning_rate=0.0, logging_steps=2, gradient_accumulation_steps=2
    )
    rows = pair_rows(8)
    trainer = AlignGPTPretrainTrainer(str(stage1_folder), args, to_dataset(rows))
    seen = 2 * 2 * args.per_device_train_batch_size
    assert seen % len(rows) == 0  # each row as often
    trainer.train()
    (log,) = [log for log in trainer.state.log_history if "loss" in log]
    levels, losses, tokens = {row["align_level"] for row in rows}, {}, {}
    model = trainer.model.eval()
    for level in levels:
        batch = trainer.data_collator([row for row in rows if row["align_level"] == level])
        batch.pop("row_index", None)
        count = int((batch["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            losses[level], tokens[level] = model(**batch).loss.item(), count
    assert {name for name in log if name.startswith("loss_level_")} == {f"loss_level_{level}" for level in levels}
    for level in levels:
        assert log[f"loss_level_{level}"] == pytest.approx(losses[level], abs=2e-4)
    whole = sum(losses[level] * tokens[level] for level in levels) / sum(tokens.values())
    assert log["loss"] == pytest.approx(whole, abs=1e-3)
    assert 0 <= log["padding"] < 1


def test_the_gate_is_told_by_kind_of_answer(stage1_folder, tmp_path):
    short, long = conversation_rows(8)[0], json.loads(json.dumps(conversation_rows(8)[1], default=str))
    long["images"] = conversation_rows(8)[1]["images"]
    answer = next(message for message in long["messages"] if message["role"] == "assistant")
    answer["content"][0]["text"] = "a red square on a grey wall and " * 4
    trainer = instruct(stage1_folder, tmp_path, [short, long] * 4, max_steps=1, learning_rate=0.0, logging_steps=1)
    trainer.train()
    log = next(log for log in trainer.state.log_history if "loss" in log)
    for kind, row in (("short", short), ("long", long)):
        batch = trainer.data_collator([row])
        batch.pop("row_index", None)
        with torch.no_grad():
            weights = trainer.model.eval()(**batch).align_weights[0].tolist()
        found = [log[f"gate_{kind}_{level}"] for level in range(NUM_LEVELS)]
        assert found == pytest.approx(weights, abs=1e-3)
    assert not any(name.startswith("loss_level") for name in log)


def test_what_no_row_tells_is_not_logged(stage1_folder, tmp_path):
    """Without a gate there are no weights, and with a level for each row its loss is told apart."""
    rows = [{**row, "align_level": index % 3} for index, row in enumerate(conversation_rows(6))]
    trainer = instruct(stage1_folder, tmp_path, rows, align_mode="level", max_steps=3, logging_steps=3)
    trainer.train()
    log = next(log for log in trainer.state.log_history if "loss" in log)
    assert not any(name.startswith("gate_") for name in log)
    assert {name for name in log if name.startswith("loss_level_")} >= {f"loss_level_{level}" for level in range(3)}


@pytest.mark.parametrize("mode", ["global", "gate", "mean"])
def test_padding_is_logged_in_every_mode(stage1_folder, tmp_path, mode):
    trainer = instruct(stage1_folder, tmp_path, align_mode=mode, max_steps=2, logging_steps=2)
    trainer.train()
    log = next(log for log in trainer.state.log_history if "loss" in log)
    assert log["padding"] == pytest.approx(trainer.summary()["padding_waste"], abs=1e-4)


def test_watching_changes_nothing(stage1_folder, tmp_path):
    """The weights after a run are those of one that nobody watches, to the last bit."""
    found = []
    for watched in (True, False):
        args = settings(AlignGPTPretrainConfig, tmp_path / str(watched), max_steps=3)
        trainer = AlignGPTPretrainTrainer(str(stage1_folder), args, to_dataset(pair_rows(8)))
        trainer.watch.levels = watched
        trainer.train()
        found.append(trainer.model.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_tensorboard_shows_answers_and_weights(stage1_folder, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = instruct(stage1_folder, tmp_path, report_to=["tensorboard"], logging_steps=2, **EVALUATE)
    trainer.train()
    (folder,) = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/padding", "train/gate_short_0", "eval/loss", "eval/answer_match", *WEIGHTS} <= tags
    assert [event.step for event in events.Scalars(WEIGHTS[0])] == [2, 4]
    logged = [log["eval_align_weight_0"] for log in trainer.summary()["eval"]]
    assert [event.value for event in events.Scalars(WEIGHTS[0])] == pytest.approx(logged)
    # the last of the four rows has no image
    assert [f"eval_answers/{row}" in events.Tags()["images"] for row in range(4)] == [True, True, True, False]
    text = events.Tensors("eval_answers/3/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "reference: " in text


def test_trackio_shows_answers_and_weights(stage1_folder, tmp_path, monkeypatch):
    """A local database, without a server on the net."""
    import trackio.media  # noqa: F401, so that its copy of the folder's name is there
    from trackio import sqlite_storage

    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "trackio":
            for constant, folder in (("TRACKIO_DIR", "trackio"), ("MEDIA_DIR", "trackio/media")):
                if hasattr(module, constant):
                    monkeypatch.setattr(module, constant, tmp_path / folder)
    trainer = instruct(
        stage1_folder, tmp_path, report_to=["trackio"], project="aligngpt-test", run_name="one", **EVALUATE
    )
    trainer.train()
    logs = sqlite_storage.SQLiteStorage.get_logs("aligngpt-test", "one")
    assert any(WEIGHTS[0] in log for log in logs) and any("train/loss" in log for log in logs)
    assert (tmp_path / "trackio" / "aligngpt-test.db").exists()
    tables = [log["eval_answers"] for log in logs if "eval_answers" in log]
    assert len(tables) == 2, [sorted(log) for log in logs]
    rows = tables[0]["_value"]
    assert [row["reference"] for row in rows][:2] == ["red", "blue"] and rows[0]["image"] and not rows[3]["image"]


def test_wandb_shows_answers_and_weights(stage1_folder, tmp_path, monkeypatch):
    """Offline, as on a machine without a network."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "wandb"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    import wandb

    wandb.teardown()  # what another test has settled in this process
    trainer = instruct(stage1_folder, tmp_path, report_to=["wandb"], run_name="one", **EVALUATE)
    try:
        trainer.train()
        summary = dict(wandb.run.summary)
        files = wandb.run.dir
    finally:
        wandb.finish()
    assert {"train/loss", "eval/answer_match", *WEIGHTS} <= summary.keys()
    tables = sorted((Path(files) / "media" / "table").rglob("eval_answers*.json"))
    assert len(tables) == 2
    table = json.loads(tables[0].read_text())
    assert table["columns"][:3] == ["image", "prompt", "reference"] and len(table["data"]) == 4
    # images travel in the table's artifact
    staged = [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert sum(path.read_bytes()[:4] == b"\x89PNG" for path in staged) >= 3, staged
    assert [row[0] for row in table["data"]] == ["Image", "Image", "Image", None]


def test_a_tracker_that_fails_stops_nothing(stage1_folder, tmp_path, monkeypatch, caplog):
    from torch.utils.tensorboard import SummaryWriter

    def refuse(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(SummaryWriter, "add_image", refuse)
    trainer = instruct(stage1_folder, tmp_path, report_to=["tensorboard"], **EVALUATE)
    trainer.train()
    assert trainer.state.global_step == 4
