"""Two runs in one folder, finished models, damaged checkpoints, other settings: refused by name, nothing lost."""

import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stage_parts import pair_rows, settings, to_dataset

from aligngpt_shared.locks import lock, lock_of
from aligngpt_trainers import AlignGPTPretrainConfig, AlignGPTPretrainTrainer
from aligngpt_trainers.checkpoints import (
    CheckpointError,
    checkpoint_to_continue,
    find_last_checkpoint,
    has_checkpoints,
)
from aligngpt_trainers.continuing import ContinuationError
from aligngpt_trainers.guards import NonFiniteError
from aligngpt_trainers.storage.manifest import damage


@pytest.fixture(scope="module")
def rows():
    return to_dataset(pair_rows(16))


def trainer_for(assembled, folder, rows, **changes):
    model, processor = assembled
    values = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 3, **changes}
    return AlignGPTPretrainTrainer(
        model, settings(AlignGPTPretrainConfig, folder, **values), rows, processing_class=processor
    )


@pytest.fixture
def stopped(assembled, rows, tmp_path):
    """A folder with two checkpoints and no finished model."""
    trainer_for(assembled, tmp_path / "run", rows).train()
    return tmp_path / "run"


# ---- one writer, nothing overwritten ----


def test_a_second_run_in_the_same_folder_is_refused(assembled, rows, tmp_path):
    trainer = trainer_for(assembled, tmp_path / "run", rows)
    with lock(lock_of(tmp_path / "run")), pytest.raises(ValueError, match="run is being written by"):
        trainer.train()
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").glob("checkpoint-*"))
    trainer.train()
    assert not lock_of(tmp_path / "run").exists()


def test_checkpoints_of_an_earlier_run_are_refused_also_in_python(assembled, rows, stopped):
    before = sorted(path.name for path in stopped.iterdir())
    with pytest.raises(ValueError, match=r"holds checkpoints of an earlier run.*overwrite"):
        trainer_for(assembled, stopped, rows).train()
    assert sorted(path.name for path in stopped.iterdir()) == before


def test_a_finished_model_is_refused_and_replaced_on_purpose(assembled, rows, tmp_path):
    first = trainer_for(assembled, tmp_path, rows, save_strategy="no")
    first.train()
    first.save_final()
    with pytest.raises(ValueError, match=r"holds a finished model \(training_summary\.json\).*overwrite"):
        trainer_for(assembled, tmp_path, rows).train()
    again = trainer_for(assembled, tmp_path, rows, overwrite=True)
    again.train()
    assert json.loads((tmp_path / "training_summary.json").read_text())["steps"] == 2


def test_checkpoints_rotate_by_step_and_not_by_time(assembled, rows, stopped):
    """A clock that was ahead when the first was written."""
    ahead = time.time() + 10**6
    for path in [stopped / "checkpoint-1", *(stopped / "checkpoint-1").iterdir()]:
        os.utime(path, (ahead, ahead))
    shutil.rmtree(stopped / "checkpoint-2")
    trainer_for(assembled, stopped, rows, resume_from_checkpoint="auto", save_total_limit=1).train()
    assert [path.name for path in stopped.glob("checkpoint-*")] == ["checkpoint-2"]


# ---- other settings ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 5e-4}, "learning_rate was .* and is 0.0005"),
        ({"align_learning_rate": 5e-4}, "align_learning_rate was None and is 0.0005"),
        ({"seed": 7}, "seed was .* and is 7"),
        ({"num_train_epochs": 3.0}, "num_train_epochs was 1.0 and is 3.0"),
        ({"max_steps": 5}, "max_steps was 2 and is 5"),
        ({"lr_scheduler_type": "linear"}, "lr_scheduler_type was .* and is linear"),
        ({"weight_decay": 0.1}, "weight_decay was 0.0 and is 0.1"),
        ({"image_aspect_ratio": "pad"}, "image_aspect_ratio was square and is pad"),
        ({"group_by": "length"}, "group_by was none and is length"),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}, "global batch was .* and is 2"),
    ],
)
def test_what_decides_the_outcome_must_not_change(assembled, rows, stopped, change, message):
    with pytest.raises(ContinuationError, match=f"checkpoint-2 cannot be continued with other settings: .*{message}"):
        trainer_for(assembled, stopped, rows, resume_from_checkpoint="auto", **change).train()


def test_other_rows_are_refused(assembled, rows, stopped):
    for other in (rows.select(range(12)), rows.select([1, 0, *range(2, 16)])):
        with pytest.raises(ContinuationError, match=r"training rows was 16 rows, .* and is 1[26] rows, "):
            trainer_for(assembled, stopped, other, resume_from_checkpoint="auto").train()


def test_what_may_change_is_said_and_kept_with_its_step(assembled, rows, tmp_path, caplog):
    batch = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    trainer_for(assembled, tmp_path, rows, **batch).train()
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_steps": 2}
    shutil.rmtree(tmp_path / "checkpoint-2")
    resumed = trainer_for(assembled, tmp_path, rows, resume_from_checkpoint="auto", **split)
    resumed.train()
    names = {
        (change["setting"], change["before"], change["after"], change["step"]) for change in resumed.setting_changes
    }
    assert ("per_device_train_batch_size", 4, 2, 1) in names and ("gradient_accumulation_steps", 1, 2, 1) in names
    assert resumed.summary()["setting_changes"] == resumed.setting_changes
    assert "per_device_train_batch_size changed from 4 to 2 at step 1" in caplog.text


# ---- damage ----

DAMAGE = {
    "optimizer is gone": (lambda f: (f / "optimizer.pt").unlink(), "optimizer.pt is missing"),
    "scheduler is gone": (lambda f: (f / "scheduler.pt").unlink(), "scheduler.pt is missing"),
    "weights are gone": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "weights are cut": (lambda f: cut(f / "model.safetensors"), "model.safetensors has .* bytes, .* were written"),
    "optimizer is cut": (lambda f: cut(f / "optimizer.pt"), "optimizer.pt has .* bytes"),
    "a bit of the weights": (lambda f: flip(f / "model.safetensors", -9), "model.safetensors is not what was written"),
    "a bit of the header": (lambda f: flip(f / "model.safetensors", 40), "model.safetensors has another header"),
    "a bit of the optimizer": (lambda f: flip(f / "optimizer.pt", 400), "optimizer.pt is not what was written"),
    "the manifest": (lambda f: (f / "manifest.json").write_text("{"), "manifest.json cannot be read"),
}


def cut(path: Path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path, place: int):
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_and_the_last_whole_checkpoint_taken(stopped, caplog, name):
    spoil, message = DAMAGE[name]
    spoil(stopped / "checkpoint-2")
    assert find_last_checkpoint(stopped) == str(stopped / "checkpoint-1")
    assert "checkpoint-2 is damaged" in caplog.text
    assert re.search(message, damage(stopped / "checkpoint-2"))


def test_a_damaged_checkpoint_that_is_named_stops_the_run(assembled, rows, stopped):
    (stopped / "checkpoint-2" / "optimizer.pt").unlink()
    trainer = trainer_for(assembled, stopped, rows, resume_from_checkpoint=str(stopped / "checkpoint-2"))
    with pytest.raises(CheckpointError, match=r"checkpoint-2 is damaged \(optimizer\.pt is missing\)"):
        trainer.train()


def test_no_whole_checkpoint_is_said(assembled, rows, stopped):
    for path in stopped.glob("checkpoint-*"):
        (path / "scheduler.pt").unlink()
    with pytest.raises(CheckpointError, match="holds checkpoints, but no whole one"):
        trainer_for(assembled, stopped, rows, resume_from_checkpoint="auto").train()


def test_it_goes_on_from_the_earlier_one(assembled, rows, stopped):
    cut(stopped / "checkpoint-2" / "model.safetensors")
    whole = load_file(stopped / "checkpoint-1" / "model.safetensors")
    trainer = trainer_for(assembled, stopped, rows, resume_from_checkpoint="auto")
    trainer.train()
    assert trainer.resumed_from.endswith("checkpoint-1") and trainer.state.global_step == 2
    assert whole.keys() == load_file(stopped / "checkpoint-2" / "model.safetensors").keys()
    assert damage(stopped / "checkpoint-2") is None


def test_a_checkpoint_without_a_manifest_is_not_whole(stopped):
    folder = stopped / "checkpoint-2"
    (folder / "manifest.json").unlink()
    assert damage(folder) == "manifest.json is missing: the save was cut off"
    assert find_last_checkpoint(stopped).endswith("checkpoint-1")
    # killed within its first save: a run that is continued begins anew, another one is refused
    shutil.rmtree(stopped / "checkpoint-1")
    assert checkpoint_to_continue("auto", stopped) is None
    assert has_checkpoints(stopped) and not has_checkpoints(stopped, resuming=True)


# ---- numbers ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": float("inf")}, "learning_rate=inf cannot be"),
        ({"learning_rate": float("nan")}, "learning_rate=nan is not a number"),
        ({"learning_rate": -1e-3}, "learning_rate=-0.001 cannot be: it must be at least 0"),
        ({"projector_learning_rate": float("inf")}, "projector_learning_rate=inf cannot be"),
        ({"align_learning_rate": -1e-3}, "align_learning_rate=-0.001 cannot be: it must be at least 0"),
        ({"gradient_accumulation_steps": -1}, "gradient_accumulation_steps=-1 cannot be: it must be at least 1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0 cannot be"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0 cannot be"),
        ({"num_train_epochs": 0}, "num_train_epochs=0 cannot be: it must be more than 0"),
        ({"max_steps": 0}, "max_steps=0 cannot be"),
        ({"max_steps": -5}, "max_steps=-5 cannot be"),
        ({"weight_decay": float("nan")}, "weight_decay=nan is not a number"),
        ({"adam_beta2": 1.0}, "adam_beta2=1.0 cannot be"),
        ({"adam_epsilon": 0.0}, "adam_epsilon=0.0 cannot be"),
        ({"max_length": 0}, "max_length=0 cannot be"),
        ({"save_total_limit": 0}, "save_total_limit=0 cannot be"),
        ({"seed": -1}, "seed=-1 cannot be"),
    ],
)
def test_numbers_that_no_run_can_have(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        settings(AlignGPTPretrainConfig, tmp_path, **change)


def test_weights_are_looked_at_before_they_are_called_final(assembled, rows, tmp_path):
    trainer = trainer_for(assembled, tmp_path, rows, save_strategy="no")
    trainer.train()
    with torch.no_grad():
        trainer.model.model.multi_modal_projector.linear_1.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"1 weights hold NaN or infinity .*projector\.linear_1\.weight"):
        trainer.save_final()
    assert not (tmp_path / "training_summary.json").exists() and not (tmp_path / "unfinished").exists()
