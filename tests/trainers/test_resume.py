"""A run that was stopped anywhere goes on to the same weights, bit for bit; nothing half-saved is taken for whole."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stage_parts import conversation_rows, losses, pair_rows, settings, to_dataset
from transformers import TrainerCallback, set_seed

from aligngpt_trainers import (
    AlignGPTInstructConfig,
    AlignGPTInstructTrainer,
    AlignGPTPretrainConfig,
    AlignGPTPretrainTrainer,
)
from aligngpt_trainers.stage import CheckpointError, TrainingStopped, find_last_checkpoint
from aligngpt_trainers.storage.manifest import write_manifest


STEPS = 7  # an epoch has four steps: one run is one epoch and most of a second
SCRIPT = Path(__file__).with_name("run_stage.py")
STAGES = {
    "pretrain": (AlignGPTPretrainTrainer, AlignGPTPretrainConfig, pair_rows),
    "instruct": (AlignGPTInstructTrainer, AlignGPTInstructConfig, conversation_rows),
}
RUN = {
    "max_steps": STEPS,
    "lr_scheduler_type": "cosine",
    "projector_learning_rate": 3e-3,
    "group_by": "modality_length",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "logging_steps": 1,
}


class SendSignal(TrainerCallback):
    """A signal to this very process in the middle of a step."""

    def __init__(self, number: int, step: int):
        self.number, self.step = number, step

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), self.number)


def trainer_for(stage: str, model: Path, folder: Path, callbacks=None, dropout: float = 0.0, **overrides):
    trainer_class, config_class, rows = STAGES[stage]
    own = {"align_learning_rate": 7e-3} if stage == "pretrain" else {}
    args = settings(config_class, folder, **{**RUN, **own, **overrides})
    held_out = to_dataset(rows(4)) if "eval_strategy" in overrides else None
    trainer = trainer_class(str(model), args, to_dataset(rows(16)), held_out, callbacks=callbacks)
    # dropout makes the run depend on the random state
    trainer.model.config.text_config.attention_dropout = dropout
    for module in trainer.model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = dropout
    return trainer


def final_weights(trainer) -> dict[str, torch.Tensor]:
    trainer.save_final()
    return load_file(Path(trainer.args.output_dir) / "model.safetensors")


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.fixture(scope="module")
def straight(stage1_folder, tmp_path_factory):
    """Weights and losses of uninterrupted runs."""
    runs = {}
    for stage in STAGES:
        trainer = trainer_for(stage, stage1_folder, tmp_path_factory.mktemp("straight"), dropout=0.1)
        trainer.train()
        runs[stage] = final_weights(trainer), losses(trainer)
    return runs


@pytest.mark.parametrize(
    ("stage", "step"),
    [("pretrain", 1), ("instruct", 2), ("pretrain", 3), ("instruct", 4), ("instruct", 5), ("pretrain", 6)],
)
def test_a_signal_at_any_step_loses_nothing(straight, stage1_folder, tmp_path, stage, step):
    number = signal.SIGTERM if step % 2 else signal.SIGINT
    workers = 2 if step == 5 else 0  # they change nothing either
    handler = signal.getsignal(number)
    stopped = trainer_for(
        stage, stage1_folder, tmp_path, [SendSignal(number, step)], 0.1, dataloader_num_workers=workers
    )
    with pytest.raises(TrainingStopped) as error:
        stopped.train()
    assert error.value.code == 128 + number and error.value.step == step
    assert f"checkpoint-{step} is saved" in str(error.value) and "resume_from_checkpoint=auto" in str(error.value)
    assert signal.getsignal(number) is handler
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{step}"]
    set_seed(1000 + step)  # whatever state the new process is in must not matter
    resumed = trainer_for(stage, stage1_folder, tmp_path, None, 0.1, resume="auto", dataloader_num_workers=workers)
    resumed.train()
    weights, curve = straight[stage]
    assert resumed.resumed_from.endswith(f"checkpoint-{step}")
    assert losses(resumed) == curve
    assert equal(final_weights(resumed), weights)
    assert resumed.summary()["resumed"] and resumed.summary()["steps"] == STEPS


@pytest.mark.parametrize("step", [3, 4, 5])
def test_a_stream_goes_on_too(stage1_folder, tmp_path, step):
    """It is read again up to the place: in its first pass, at its end, in the second."""

    def streamed(folder: Path, callbacks=None, **overrides):
        rows = to_dataset(pair_rows(16)).to_iterable_dataset(num_shards=2).shuffle(seed=3, buffer_size=8)
        args = settings(AlignGPTPretrainConfig, folder, **{**RUN, "group_by": "none", **overrides})
        trainer = AlignGPTPretrainTrainer(str(stage1_folder), args, rows, callbacks=callbacks)
        try:
            trainer.train()
        except TrainingStopped:
            return None
        return final_weights(trainer)

    straight = streamed(tmp_path / "straight")
    assert streamed(tmp_path / "two", [SendSignal(signal.SIGTERM, step)]) is None
    assert equal(streamed(tmp_path / "two", resume="auto"), straight)


def test_the_comparison_is_sharp(straight, stage1_folder, tmp_path):
    """The runs above depend on the random state: without it, the same checkpoint goes on to other weights."""
    stopped = trainer_for("instruct", stage1_folder, tmp_path, [SendSignal(signal.SIGTERM, 2)], 0.1)
    with pytest.raises(TrainingStopped):
        stopped.train()
    (tmp_path / "checkpoint-2" / "rng_state.pth").unlink()
    write_manifest(tmp_path / "checkpoint-2")
    resumed = trainer_for("instruct", stage1_folder, tmp_path, None, 0.1, resume="auto")
    resumed.train()
    assert not equal(final_weights(resumed), straight["instruct"][0])


def test_a_signal_at_the_last_step_lets_the_run_end(straight, stage1_folder, tmp_path):
    trainer = trainer_for("pretrain", stage1_folder, tmp_path, [SendSignal(signal.SIGTERM, STEPS)], 0.1)
    trainer.train()
    assert equal(final_weights(trainer), straight["pretrain"][0])


def test_resuming_behind_the_last_step_takes_no_other(straight, stage1_folder, tmp_path):
    """Killed between the last checkpoint and the final save, in the middle of an epoch."""
    saves = {"save_strategy": "steps", "save_steps": 3}
    trainer_for("pretrain", stage1_folder, tmp_path, None, 0.1, **saves).train()
    assert find_last_checkpoint(tmp_path).endswith(f"checkpoint-{STEPS}")
    resumed = trainer_for("pretrain", stage1_folder, tmp_path, None, 0.1, resume="auto", **saves)
    resumed.train()
    assert resumed.state.global_step == STEPS
    assert equal(final_weights(resumed), straight["pretrain"][0])


def test_evaluating_does_not_change_training(straight, stage1_folder, tmp_path):
    args = {"eval_strategy": "steps", "eval_steps": 2, "eval_generations": 2, "eval_generation_tokens": 3}
    trainer = trainer_for("instruct", stage1_folder, tmp_path, None, 0.1, **args)
    trainer.train()
    assert equal(final_weights(trainer), straight["instruct"][0])


def test_time_and_padding_count_over_the_stop(stage1_folder, tmp_path):
    whole = trainer_for("instruct", stage1_folder, tmp_path / "whole")
    whole.train()
    stopped = trainer_for("instruct", stage1_folder, tmp_path / "two", [SendSignal(signal.SIGTERM, 3)])
    with pytest.raises(TrainingStopped):
        stopped.train()
    resumed = trainer_for("instruct", stage1_folder, tmp_path / "two", resume="auto")
    resumed.train()
    for key in ("positions", "padding_waste"):
        assert resumed.summary()[key] == whole.summary()[key]
    assert resumed.record["seconds"] > stopped.record["seconds"] > 0


def test_resume_is_one_setting_by_two_names(tmp_path):
    args = settings(AlignGPTPretrainConfig, tmp_path, resume="auto")
    assert args.resume_from_checkpoint == "auto"
    with pytest.raises(ValueError, match="are the same setting: give one of them"):
        settings(AlignGPTPretrainConfig, tmp_path, resume="auto", resume_from_checkpoint="checkpoint-1")
    with pytest.raises(ValueError, match="enable_jit_checkpoint has no effect here"):
        settings(AlignGPTPretrainConfig, tmp_path, enable_jit_checkpoint=True)
    with pytest.raises(ValueError, match="`aligngpt publish` on the finished model"):
        settings(AlignGPTPretrainConfig, tmp_path, push_to_hub=True)


# ---- saves that are cut off ----


def run_process(tmp_path: Path, stage1_folder: Path, number: int | None = None, **plan) -> subprocess.CompletedProcess:
    """A run of stage 1 in a process of its own; signal `number` goes to it and all that it started."""
    rows, ready = tmp_path / "rows", tmp_path / "ready"
    if not rows.exists():
        to_dataset(pair_rows(16)).save_to_disk(rows)
    values = {**RUN, "output_dir": str(tmp_path / "out"), "use_cpu": True, "gradient_checkpointing": False}
    values |= {"learning_rate": 1e-2, "disable_tqdm": True, "save_strategy": "steps", "save_steps": 2}
    values |= {"align_learning_rate": 7e-3}  # as `trainer_for`
    values |= plan.pop("settings", {})
    plan = {"stage": "pretrain", "model": str(stage1_folder), "rows": str(rows), "settings": values, **plan}
    plan["ready"] = str(ready)
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(tmp_path / "plan.json")]
    # a process group of its own, as a shell or a batch system gives
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    if number is not None:
        while not ready.exists() and process.poll() is None:
            time.sleep(0.05)
        os.killpg(process.pid, number)
    output, errors = process.communicate(timeout=120)
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


@pytest.fixture(scope="module")
def straight_without_dropout(stage1_folder, tmp_path_factory):
    trainer = trainer_for("pretrain", stage1_folder, tmp_path_factory.mktemp("straight"))
    trainer.train()
    return final_weights(trainer)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_process_gives_the_signals_status_and_goes_on(straight_without_dropout, stage1_folder, tmp_path, name):
    """The signal reaches the whole group: the data loaders' processes too."""
    number = getattr(signal, name)
    done = run_process(tmp_path, stage1_folder, number, await_signal_at=2, settings={"dataloader_num_workers": 2})
    assert done.returncode == 128 + number, done.stderr[-2000:]
    assert f"{name}: finishing the step" in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.count("finishing the step") == 1
    assert f"Stopped by {name} after step 2 of 7; checkpoint-2 is saved" in done.stderr
    resumed = trainer_for("pretrain", stage1_folder, tmp_path / "out", resume="auto")
    resumed.train()
    assert resumed.resumed_from.endswith("checkpoint-2")
    assert equal(final_weights(resumed), straight_without_dropout)


def test_killed_in_the_middle_of_a_save(straight_without_dropout, stage1_folder, tmp_path):
    """kill -9 with the weights of checkpoint-4 written and its optimizer state too, the rest not."""
    done = run_process(tmp_path, stage1_folder, die_saving_optimizer_at=4)
    assert done.returncode == -signal.SIGKILL
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"checkpoint-2", "checkpoint-4"} <= left
    assert not (tmp_path / "out" / "checkpoint-4" / "manifest.json").exists()
    assert find_last_checkpoint(tmp_path / "out").endswith("checkpoint-2")
    resumed = trainer_for("pretrain", stage1_folder, tmp_path / "out", resume="auto")
    resumed.train()
    assert resumed.resumed_from.endswith("checkpoint-2")
    assert equal(final_weights(resumed), straight_without_dropout)


@pytest.mark.parametrize("what", ["model", "optimizer"])
def test_a_full_disk_leaves_the_last_checkpoint(straight_without_dropout, stage1_folder, tmp_path, what):
    """Files cannot grow beyond a limit, as on a disk that is full: writing fails in the middle of a file."""
    saves = {"save_strategy": "steps", "save_steps": 2}

    class Fill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                size = (tmp_path / "checkpoint-2" / f"{files[what]}").stat().st_size
                resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))

    files = {"model": "model.safetensors", "optimizer": "optimizer.pt"}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    trainer = trainer_for("pretrain", stage1_folder, tmp_path, [Fill()], **saves)
    if what == "optimizer":
        trainer.save_model = lambda folder, **kwargs: os.makedirs(folder)  # larger than the optimizer's state
    try:
        with pytest.raises(CheckpointError) as error:
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert "checkpoint-4 could not be saved" in str(error.value)
    assert "last complete checkpoint is checkpoint-2" in str(error.value)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2"]
    if what == "model":
        resumed = trainer_for("pretrain", stage1_folder, tmp_path, resume="auto", **saves)
        resumed.train()
        assert equal(final_weights(resumed), straight_without_dropout)


def test_older_checkpoints_go_once_the_new_one_stands(stage1_folder, tmp_path):
    seen = []

    class Look(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            seen.append(sorted(path.name for path in tmp_path.glob("checkpoint-*")))

    trainer = trainer_for("pretrain", stage1_folder, tmp_path, save_strategy="steps", save_steps=2, save_total_limit=2)
    trainer.add_callback(Look())
    save = trainer._save_optimizer_and_scheduler
    during = []

    def look_and_save(folder):
        during.append(sorted(path.name for path in tmp_path.glob("checkpoint-*")))
        save(folder)

    trainer._save_optimizer_and_scheduler = look_and_save
    trainer.train()
    assert seen[2:] == [["checkpoint-4", "checkpoint-6"], ["checkpoint-6", "checkpoint-7"]]
    assert during[2] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_the_best_checkpoint_is_kept_and_found(stage1_folder, tmp_path):
    args = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    args |= {
        "save_total_limit": None,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "max_steps": 6,
        "learning_rate": 0.0,
        "align_learning_rate": None,
    }
    trainer = trainer_for("pretrain", stage1_folder, tmp_path, projector_learning_rate=None, **args)
    trainer.train()
    # without a learning rate none gets better than the first
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-2")
    best = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(tensor, best[name]) for name, tensor in trainer.model.state_dict().items())


def test_a_killed_final_save_is_no_model(stage1_folder, tmp_path):
    done = run_process(tmp_path, stage1_folder, die_in_final_save=True, settings={"max_steps": 2})
    assert done.returncode == -signal.SIGKILL
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not names & {"training_summary.json", "model.safetensors", "config.json"}
    assert {"checkpoint-2", "unfinished"} <= names
    resumed = trainer_for("pretrain", stage1_folder, tmp_path / "out", resume="auto", max_steps=2)
    resumed.train()
    resumed.save_final()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"training_summary.json", "model.safetensors"} <= names and "unfinished" not in names
