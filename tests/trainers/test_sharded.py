"""FSDP2 and DeepSpeed by the recipes, on two CPU processes: what they save is what one process saves, and loads."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stage_parts import NUM_LEVELS, conversation_rows, settings, to_dataset
from transformers import AutoModelForImageTextToText, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from aligngpt_shared.records import GATE_BEFORE
from aligngpt_trainers import AlignGPTInstructConfig, AlignGPTInstructTrainer
from aligngpt_trainers.checkpoints import CheckpointError
from aligngpt_trainers.commands import cli
from aligngpt_trainers.storage.saved_model import SavedModelError, check_saved
from modeling_aligngpt import AlignGPTForConditionalGeneration
from modeling_aligngpt.assembly import assemble


SCRIPT = Path(__file__).with_name("run_sharded.py")
LIMIT = 600


def headers(folder: Path) -> dict[str, tuple]:
    """Names, shapes and dtypes of all weights of a folder, with the files they lie in."""
    found = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                found[name] = (path.name, part.get_shape(), part.get_dtype())
    return found


def code_and_config(folder: Path) -> dict[str, str]:
    kept = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.py")}
    return kept | {"config": (folder / "config.json").read_text(encoding="utf-8")}


DEEPSPEED = ("deepspeed==0.19.8", "hjson", "msgpack", "py-cpuinfo", "einops", "ninja")


@pytest.fixture(scope="session")
def deepspeed(request, tmp_path_factory) -> Path:
    """A folder with DeepSpeed for the path of the processes that shard: here, importing it would change other tests."""
    cache = getattr(request.config, "cache", None)
    folder = Path(cache.mkdir("deepspeed")) if cache else tmp_path_factory.mktemp("deepspeed")
    done = folder / DEEPSPEED[0].replace("=", "_")
    if not done.exists():
        partial = folder / f"{done.name}.{os.getpid()}.partial"
        words = ["--quiet", "--no-build-isolation", "--no-deps", "--target", str(partial), *DEEPSPEED]
        # nothing is compiled: its own kernels are for GPUs
        environment = {**os.environ, "DS_BUILD_OPS": "0"}
        command = [sys.executable, "-m", "pip", "install", *words]
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment)
        if result.returncode:
            shutil.rmtree(partial, ignore_errors=True)
            stop = pytest.fail if os.environ.get("CI") else pytest.skip
            stop(f"pip cannot install DeepSpeed: {result.stderr.strip().splitlines()[-1]}")
        os.replace(partial, done)
    return done


# the others take minutes more: `make engines-smoke`, which CI calls, runs "zero3 untied", and `make engines` all
RUNS = ["fsdp2 tied"]
if wanted := os.environ.get("ALIGNGPT_SHARDED"):
    every = [
        *RUNS,
        "fsdp2 untied",
        "fsdp2_sharded tied",
        "fsdp2_sharded untied",
        "zero2 untied",
        "zero2 tied",
        "zero3 untied",
        "zero3 tied",
    ]
    RUNS = every if wanted == "all" else wanted.split(",")


@pytest.fixture(scope="module", params=RUNS)
def both(request, parts, tmp_path_factory):
    """Folders of one training, by one process and by two that share the weights."""
    folder = tmp_path_factory.mktemp("sharded")
    llama = parts[0]
    recipe, heads = request.param.split()
    if heads == "tied":
        llama = folder / "llama"
        config = LlamaConfig.from_pretrained(parts[0], tie_word_embeddings=True)
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(llama)
        AutoTokenizer.from_pretrained(parts[0]).save_pretrained(llama)
    model, processor = assemble(llama, *parts[1:], num_align_levels=NUM_LEVELS, gate_hidden_size=16, seed=0)
    for part in (model, processor):
        part.save_pretrained(folder / "model")
    to_dataset(conversation_rows(16)).save_to_disk(folder / "rows")
    words = [
        *("instruct", f"--model={folder / 'model'}", f"--dataset={folder / 'rows'}", "--allow_unaligned"),
        *("--max_steps=3", "--learning_rate=0.1", "--lr_scheduler_type=constant", "--optim=sgd", "--max_length=512"),
        *("--save_steps=2", "--logging_steps=1", "--gradient_checkpointing=false", "--bf16=false", "--warmup_steps=0"),
        *("--gradient_accumulation_steps=1", "--disable_tqdm=true", "--report_to=none"),
        # the last of the four rows has no image: its process gathers what the other gathers all the same
        *(f"--eval_dataset={folder / 'rows'}", "--eval_strategy=steps", "--eval_steps=2"),
        *("--eval_generations=4", "--eval_generation_tokens=5"),
    ]
    one = [*words, f"--output_dir={folder / 'one'}", "--per_device_train_batch_size=4", "--use_cpu"]
    assert cli.main(one) == 0
    two = [*words, f"--output_dir={folder / 'two'}", "--per_device_train_batch_size=2"]
    (folder / "plan.json").write_text(json.dumps({"recipe": recipe, "words": two}))
    deepspeed = request.getfixturevalue("deepspeed") if recipe.startswith("zero") else None
    run(folder / "plan.json", deepspeed)
    return folder / "one", folder / "two"


def run(plan: Path, more: Path | None = None):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(SCRIPT),
        plan,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if more is not None:
        environment["PYTHONPATH"] = str(more)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=LIMIT)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_sharded_run_saves_what_one_process_saves(both):
    one, two = both
    assert headers(one) == headers(two)
    assert code_and_config(one) == code_and_config(two)


def test_a_sharded_run_learns_what_one_process_learns(both):
    one, _ = both
    models = [AlignGPTForConditionalGeneration.from_pretrained(folder) for folder in both]
    start = AlignGPTForConditionalGeneration.from_pretrained(one.parent / "model")
    moved = 0.0
    for (name, a), b, before in zip(
        models[0].state_dict().items(), models[1].state_dict().values(), start.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6, msg=name)
        moved = max(moved, float((a - before).abs().max()))
    assert moved > 1e-3
    losses = [json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in both]
    pairs = [[entry["loss"] for entry in log if "loss" in entry] for log in losses]
    assert pairs[0] == pytest.approx(pairs[1], abs=1e-4) and len(pairs[0]) == 3


def test_answers_at_evaluation_and_what_is_logged_are_one_process_s(both):
    lines = [(folder / "generations.jsonl").read_text().splitlines() for folder in both]
    answers = [list(map(json.loads, of_one)) for of_one in lines]
    # after the second step and at the end
    assert len(answers[0]) == len(answers[1]) == 8 and answers[0][3]["align_weights"] is None
    for ours, theirs in zip(*answers, strict=True):
        weights = [row.pop("align_weights") for row in (ours, theirs)]
        assert ours == theirs
        if weights[0] is not None:
            assert weights[0] == pytest.approx(weights[1], abs=1e-4)
    logs = [json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in both]
    logged = [[entry for entry in log if "gate_short_0" in entry] for log in logs]
    # the third batch is of text alone
    assert len(logged[0]) == len(logged[1]) == 2
    for ours, theirs in zip(*logged, strict=True):
        names = [name for name in ours if name.startswith("gate_")]
        assert [ours[name] for name in names] == pytest.approx([theirs[name] for name in names], abs=2e-3)


def test_a_checkpoint_goes_on_only_where_its_optimizer_fits(both, tmp_path):
    """One process would go on without the state of the optimizer, and nobody would be told."""
    one, two = both
    checkpoint = max(two.glob("checkpoint-*"))
    kept = json.loads((checkpoint / "run_settings.json").read_text())["fixed"]["sharding"]
    assert kept in ("FSDP", "FSDP with sharded checkpoints", "DeepSpeed over 2 processes")
    shutil.copytree(checkpoint, tmp_path / "run" / checkpoint.name)
    words = json.loads((one.parent / "plan.json").read_text())["words"]
    words = [word for word in words if not word.startswith(("--output_dir", "--per_device_train_batch_size"))]
    words += [f"--output_dir={tmp_path / 'run'}", "--per_device_train_batch_size=4", "--use_cpu", "--resume", "auto"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as said:
        patch.delenv("RANK", raising=False)
        assert cli.main(words) == 2
    assert f"sharding was {kept} and is none" in said.getvalue()
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_checkpoint_in_parts_is_made_whole(both, tmp_path, capsys):
    """After the last step it holds the finished model."""
    checkpoint = max(both[1].glob("checkpoint-*"))
    words = ["merge", "--checkpoint", str(checkpoint), "--output", str(tmp_path / "whole")]
    if not (checkpoint / "pytorch_model_fsdp_0").is_dir():
        assert cli.main(words) == 2 and "is no sharded checkpoint" in capsys.readouterr().err
        return
    assert not list(checkpoint.glob("*.safetensors")), "nobody has written the whole"
    assert cli.main(words) == 0
    assert headers(tmp_path / "whole") == headers(both[1])
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "whole", both[1])]
    for config in configs:  # TRL switches the cache off while it trains
        config.pop("use_cache", None)
    assert configs[0] == configs[1]
    expected = load_file(both[1] / "model.safetensors")
    for name, value in load_file(tmp_path / "whole" / "model.safetensors").items():
        assert torch.equal(value, expected[name]), name
    part = max((checkpoint / "pytorch_model_fsdp_0").glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:-100])
    assert cli.main([*words[:-1], str(tmp_path / "again")]) == 2
    assert f"{part.name} has" in capsys.readouterr().err and not (tmp_path / "again").exists()


def test_stage_2_keeps_the_gate_that_it_found(both):
    """But for ZeRO-3, where each process has a part of it."""
    start = AlignGPTForConditionalGeneration.from_pretrained(both[0].parent / "model").model.align_gate.state_dict()
    kept = [load_file(folder / GATE_BEFORE) for folder in both if (folder / GATE_BEFORE).is_file()]
    assert kept
    for gate in kept:
        assert gate.keys() == start.keys() and all(torch.equal(gate[name], start[name]) for name in start)


def test_it_loads_without_this_project(both):
    model, report = AutoModelForImageTextToText.from_pretrained(
        both[1], trust_remote_code=True, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model).__name__ == "AlignGPTForConditionalGeneration"


def damaged(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("model.align_gate.linear_1.bias"), r"lacks 1 weights \(model.align_gate.linear_1.bias\)"),
        (lambda w: w.update({"model.more": torch.ones(1)}), r"holds besides 1 weights \(model.more\)"),
        (lambda w: w.update({"model.align_embeddings.weight": torch.ones(2, 2)}), "in another shape"),
    ],
)
def test_a_save_that_would_load_as_another_model_is_refused(stage1_folder, tmp_path, change, said):
    folder = Path(shutil.copytree(stage1_folder, tmp_path / "model"))
    check_saved(folder)
    damaged(folder, change)
    with pytest.raises(SavedModelError, match=said):
        check_saved(folder)


def test_code_that_is_not_ours_is_refused(stage1_folder, tmp_path):
    folder = Path(shutil.copytree(stage1_folder, tmp_path / "model"))
    (folder / "modeling_aligngpt.py").write_text("class FSDPAlignGPT: ...")
    with pytest.raises(SavedModelError, match="does not hold it"):
        check_saved(folder)


def test_nothing_is_called_finished_that_cannot_be_read_back(stage1_folder, tmp_path, conversations, monkeypatch):
    trainer = AlignGPTInstructTrainer(
        str(stage1_folder), settings(AlignGPTInstructConfig, tmp_path, max_steps=1), conversations
    )
    trainer.train()
    save = trainer.save_model

    def save_half(folder):
        save(folder)
        damaged(Path(folder), lambda weights: weights.pop("lm_head.weight"))

    monkeypatch.setattr(trainer, "save_model", save_half)
    with pytest.raises(CheckpointError, match=r"could not be saved .*lacks 1 weights \(lm_head.weight\)"):
        trainer.save_final()
    assert not (tmp_path / "training_summary.json").exists() and not (tmp_path / "model.safetensors").exists()
