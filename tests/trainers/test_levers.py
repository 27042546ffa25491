"""Adapters, compiled models and kernels in the trainers: what they train, save and refuse."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from stage_parts import conversation_rows, losses, settings, snapshot, to_dataset
from transformers import TrainerCallback, set_seed

from aligngpt_trainers import (
    AlignGPTInstructConfig,
    AlignGPTInstructTrainer,
    AlignGPTPretrainConfig,
    AlignGPTPretrainTrainer,
)
from aligngpt_trainers.guards import NonFiniteError, TrainingStopped
from modeling_aligngpt import AlignGPTForConditionalGeneration


TARGETS = r".*\blanguage_model\..*\.(q_proj|v_proj)"


def adapter(**overrides) -> LoraConfig:
    values = {"r": 4, "lora_dropout": 0.1, "target_modules": TARGETS}
    return LoraConfig(**{**values, "modules_to_save": ["multi_modal_projector", "align_gate"], **overrides})


def trainer_for(model: Path, folder: Path, callbacks=None, peft_config=None, **overrides):
    args = settings(AlignGPTInstructConfig, folder, **overrides)
    rows = to_dataset(conversation_rows(16))
    held_out = to_dataset(conversation_rows(4)) if "eval_strategy" in overrides else None
    return AlignGPTInstructTrainer(str(model), args, rows, held_out, callbacks=callbacks, peft_config=peft_config)


# ---- adapters ----


def test_adapters_projector_and_gate_train_and_nothing_else(stage1_folder, tmp_path):
    trainer = trainer_for(stage1_folder, tmp_path, peft_config=adapter())
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    whole = {name for name in trained if "modules_to_save" in name}
    assert {name.split(".modules_to_save")[0].rpartition(".")[2] for name in whole} == {
        "multi_modal_projector",
        "align_gate",
    }
    assert all("language_model" in name and "lora_" in name for name in trained - whole) and trained - whole
    before = snapshot(trainer.model)
    trainer.train()
    after = trainer.model.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == trained
    summary = trainer.save_final()
    counted = sum(p.numel() for name, p in trainer.model.named_parameters() if name in trained)
    assert summary["trained_parameters"] == trainer.trained_parameters() == counted
    assert summary["hyperparameters"]["lora"] == {
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.1,
        "use_dora": False,
        "use_rslora": False,
    }
    names = {path.name for path in tmp_path.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "training_summary.json"} <= names
    assert {"modeling_aligngpt.py", "processing_aligngpt.py", "processor_config.json", "config.json"} <= names
    assert not names & {"model.safetensors", "README.md", "unfinished", "training_args.bin"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["align_mode"], config["training_stage"]) == ("gate", "instruct") and "auto_map" in config


def test_the_gate_rests_where_the_mode_has_no_use_for_it(stage1_folder, tmp_path):
    trainer = trainer_for(stage1_folder, tmp_path, peft_config=adapter(), align_mode="global")
    assert not any("align_gate" in name for name, p in trainer.model.named_parameters() if p.requires_grad)
    trainer.train()


def test_an_adapter_resumes_bit_for_bit(stage1_folder, tmp_path):
    """With dropout in the adapter, both learning rates, and the signal in the second epoch."""

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4:
                os.kill(os.getpid(), signal.SIGTERM)

    run = {"max_steps": 7, "lr_scheduler_type": "cosine", "projector_learning_rate": 1e-3}
    straight = trainer_for(stage1_folder, tmp_path / "straight", peft_config=adapter(), **run)
    straight.train()
    straight.save_final()
    stopped = trainer_for(stage1_folder, tmp_path / "two", [Stop()], adapter(), **run)
    with pytest.raises(TrainingStopped):
        stopped.train()
    set_seed(77)
    resumed = trainer_for(stage1_folder, tmp_path / "two", None, adapter(), resume="auto", **run)
    resumed.train()
    resumed.save_final()
    assert losses(straight) == losses(resumed)
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("straight", "two"))
    assert ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_an_adapter_is_evaluated_and_guarded(stage1_folder, tmp_path):
    run = {"eval_strategy": "steps", "eval_steps": 2, "eval_generations": 2, "eval_generation_tokens": 4}
    trainer = trainer_for(stage1_folder, tmp_path, peft_config=adapter(), **run, max_steps=2)
    trainer.train()
    assert "eval_align_weight_0" in trainer.summary()["eval"][0]
    trainer.model.get_input_embeddings().weight.data.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="It comes from: row"):
        trainer.train()


def test_adapters_that_make_no_sense_are_refused(stage1_folder, pairs, tmp_path):
    with pytest.raises(ValueError, match="modules_to_save lacks align_gate"):
        trainer_for(stage1_folder, tmp_path, peft_config=adapter(modules_to_save=["multi_modal_projector"]))
    with pytest.raises(ValueError, match="draws the level table afresh, and an adapter would not hold it"):
        trainer_for(stage1_folder, tmp_path, peft_config=adapter(), align_mode="random")
    args = settings(AlignGPTPretrainConfig, tmp_path)
    with pytest.raises(ValueError, match="peft_config has no effect in stage 1"):
        AlignGPTPretrainTrainer(str(stage1_folder), args, pairs, peft_config=adapter())


# ---- compiled models, kernels ----


def test_a_compiled_model_trains_alike_and_is_saved_plain(stage1_folder, tmp_path, monkeypatch):
    """Traced by TorchDynamo; the code it would generate is left out here (the inductor backend takes minutes)."""
    # transformers hands the backend to accelerate by the environment, for all that comes after
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    runs = []
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        folder = tmp_path / str(bool(compiled))
        trainer = trainer_for(stage1_folder, folder, max_steps=2, pad_to_multiple_of=256, **compiled)
        trainer.train()
        trainer.save_final()
        runs.append((losses(trainer), load_file(folder / "model.safetensors")))
    assert runs[0][0] == pytest.approx(runs[1][0], abs=1e-5)
    assert runs[0][1].keys() == runs[1][1].keys()
    for name, tensor in runs[0][1].items():
        torch.testing.assert_close(tensor, runs[1][1][name], rtol=1e-3, atol=1e-4, msg=name)
    AlignGPTForConditionalGeneration.from_pretrained(tmp_path / "True")


def test_kernels_need_their_package(stage1_folder, tmp_path):
    from transformers.utils import is_kernels_available

    if is_kernels_available():
        trainer = trainer_for(stage1_folder, tmp_path, use_kernels=True)
        assert trainer.model.use_kernels
    else:
        with pytest.raises(ValueError, match="pip install kernels"):
            trainer_for(stage1_folder, tmp_path, use_kernels=True)
