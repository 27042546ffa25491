"""Two processes (gloo on the CPU) do what one does, start from the same weights and stop at the same step."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stage_parts import conversation_rows, losses, pair_rows, settings, to_dataset
from trl.trainer.utils import add_fused_lm_head

from aligngpt_trainers import (
    AlignGPTInstructConfig,
    AlignGPTInstructTrainer,
    AlignGPTPretrainConfig,
    AlignGPTPretrainTrainer,
)
from modeling_aligngpt import AlignGPTForConditionalGeneration


SCRIPT = Path(__file__).with_name("run_processes.py")
BAD_WORD = "q"
# Too long for a healthy run, short for one that hangs.
LIMIT = 400


def rows_apart(number: int) -> list[dict]:
    """Four rows with images, four without, and so on: in batches of four, each process has one kind."""
    rows = conversation_rows(4 * number)
    with_images = [row for row in rows if row["images"]][:number]
    without = [row for row in rows if not row["images"]][:number]
    apart = []
    for start in range(0, number, 4):
        apart += [*with_images[start : start + 4], *without[start : start + 4]]
    return apart


def rows_apart_and_bad() -> list[dict]:
    rows = rows_apart(12)
    # of the third step and the second process
    rows[22]["messages"][0]["content"][0]["text"] = f"{BAD_WORD} {BAD_WORD}"
    return rows


RUN = {
    "use_cpu": True,
    "gradient_checkpointing": False,
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "gradient_accumulation_steps": 1,
    "max_steps": 3,
    "train_sampling_strategy": "sequential",
    "group_by": "none",
}


@pytest.fixture(scope="module")
def two(parts, stage1_folder, tmp_path_factory):
    """Folder with what the two processes report."""
    folder = tmp_path_factory.mktemp("two")
    data = {
        "pairs": pair_rows(16),
        "apart": rows_apart_and_bad(),
        "mixed": conversation_rows(16),
        "held_out": conversation_rows(5),
    }
    for name, rows in data.items():
        to_dataset(rows).save_to_disk(folder / name)
    plan = {
        "folder": str(folder),
        "model": str(stage1_folder),
        "parts": [str(part) for part in parts],
        "rows": {name: str(folder / name) for name in data},
        "settings": {**RUN, "per_device_train_batch_size": 4},
        "bad_word": BAD_WORD,
        "checks": ["starts_equal", "trains", "stops_at_nan", "stops_and_resumes", "evaluates", "shards"],
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(folder / "plan.json")],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=LIMIT,
    )
    (folder / "stderr.txt").write_text(done.stderr)
    return folder


def report(two: Path, name: str) -> dict:
    path = two / f"{name}.json"
    assert path.exists(), (two / "stderr.txt").read_text()[-3000:]
    return json.loads(path.read_text())


def test_projector_levels_and_gate_start_identical(two):
    first, second = report(two, "starts_equal")["checksums"]
    assert first == second > 0


@pytest.mark.parametrize("stage", ["pretrain", "instruct"])
def test_two_processes_train_as_one(two, stage1_folder, tmp_path, stage):
    """In stage 2, one process has images when the other has none."""
    trainer_class, config_class, rows = {
        "pretrain": (AlignGPTPretrainTrainer, AlignGPTPretrainConfig, pair_rows(16)),
        "instruct": (AlignGPTInstructTrainer, AlignGPTInstructConfig, rows_apart_and_bad()),
    }[stage]
    args = settings(config_class, tmp_path, **{**RUN, "per_device_train_batch_size": 8})
    one = trainer_class(str(stage1_folder), args, to_dataset(rows))
    one.train()
    one.save_final()
    ours = report(two, "trains")[stage]
    if stage == "instruct":
        assert [set(kinds) for kinds in ours["pictures"]] == [{True}, {False}]
    torch.testing.assert_close(torch.tensor(ours["losses"]), torch.tensor(losses(one)), rtol=1e-5, atol=1e-5)
    theirs = load_file(tmp_path / "model.safetensors")
    for name, tensor in load_file(two / f"two-{stage}" / "model.safetensors").items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-6, msg=name)
    # counted over both
    summary = ours["summary"]
    assert summary["batch_size"] == 8 and summary["hardware"]["processes"] == 2
    attended = sum(one.train_dataset[: 8 * 3]["length"]) + (len(rows) < 8 * 3) * sum(one.train_dataset[:8]["length"])
    assert round(summary["positions"] * (1 - summary["padding_waste"])) == pytest.approx(attended, abs=1)


def test_nan_in_one_process_stops_both_with_the_row_named(two):
    first, second = report(two, "stops_at_nan")["messages"]
    assert first == second
    assert "at step 3" in first and "It comes from: row 22." in first


def test_a_signal_to_one_process_stops_both_and_the_run_goes_on(two):
    """In the second epoch of batches that are grouped over both processes."""
    found = report(two, "stops_and_resumes")
    assert found["batches_of_epoch"] == 2
    assert found["stopped"] == [[4, 143], [4, 143]]
    assert found["equal"] == [True, True] and found["losses"][0] == found["losses"][1]


def test_both_processes_share_the_evaluation(two):
    first, second = report(two, "evaluates")["metrics"]
    assert {key for key in first if "align_weight" in key} == {f"eval_align_weight_{level}" for level in range(4)}
    for key in first:
        if "align_weight" in key or "match" in key:
            assert first[key] == second[key]
    lines = [json.loads(line) for line in (two / "eval" / "generations.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == [0, 2, 4] and {line["step"] for line in lines} == {2}


def test_sharded_weights_with_images_in_one_process_alone(two, stage1_folder, tmp_path):
    """FSDP2 with the fused head: neither hangs nor differs from one process with all rows."""
    found = report(two, "shards")
    assert found["pictures"] == [True, False]
    args = settings(AlignGPTInstructConfig, tmp_path)
    rows = rows_apart_and_bad()[:8]
    trainer = AlignGPTInstructTrainer(str(stage1_folder), args, to_dataset(rows))
    model = AlignGPTForConditionalGeneration.from_pretrained(stage1_folder).train()
    model.config.align_mode = "gate"
    add_fused_lm_head(model)
    loss = model(**trainer.data_collator(rows), fused_lm_head=True).loss
    loss.backward()
    assert sum(found["losses"]) == pytest.approx(float(loss), rel=1e-5)
    sharded = load_file(two / "fsdp.safetensors")
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trained <= sharded.keys()
    for name, parameter in model.named_parameters():
        if name in trained:
            torch.testing.assert_close(sharded[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
