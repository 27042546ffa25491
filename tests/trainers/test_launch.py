"""`--accelerate_config`: commands that start their own processes."""

import json

import pytest
import torch
import yaml
from stage_parts import pair_rows, to_dataset

from aligngpt_trainers.commands.cli import main
from aligngpt_trainers.commands.launch import check_config, launch_words, split_words
from modeling_aligngpt import AlignGPTForConditionalGeneration


@pytest.fixture
def two_processes(tmp_path):
    """Two processes on the CPU, joined by gloo."""
    path = tmp_path / "two.yaml"
    settings = {"distributed_type": "MULTI_GPU", "use_cpu": True, "num_machines": 1, "num_processes": 2}
    path.write_text(yaml.safe_dump({"compute_environment": "LOCAL_MACHINE", "mixed_precision": "no", **settings}))
    return path


def test_two_processes_train_what_one_does(stage1_folder, two_processes, tmp_path, capfd):
    """The recipe in YAML, two processes by the command's own option: same rows, same total batch, same weights."""
    to_dataset(pair_rows(16)).save_to_disk(tmp_path / "pairs")
    recipe = tmp_path / "pretrain.yaml"
    settings = {
        "model": str(stage1_folder),
        "dataset": str(tmp_path / "pairs"),
        "use_cpu": True,
        "logging_steps": 1,
        "max_steps": 2,
        "optim": "sgd",
        "learning_rate": 0.1,
        "gradient_accumulation_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    recipe.write_text(yaml.safe_dump(settings))
    words = ["pretrain", "--config", str(recipe), "--per_device_train_batch_size", "4"]
    # a port of its own: other tests may launch at the same moment
    launch = ["--accelerate_config", str(two_processes), "--main_process_port", "0"]
    assert main([*words, "--output_dir", str(tmp_path / "two"), *launch]) == 0, capfd.readouterr().err[-2000:]
    assert capfd.readouterr().out.count("saved to") == 1
    summary = json.loads((tmp_path / "two" / "training_summary.json").read_text())
    assert (summary["batch_size"], summary["hyperparameters"]["processes"]) == (8, 2)
    assert main([*words[:-1], "8", "--output_dir", str(tmp_path / "one")]) == 0
    two, one = (
        AlignGPTForConditionalGeneration.from_pretrained(tmp_path / name).state_dict() for name in ("two", "one")
    )
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=0, atol=1e-4)


def test_a_failing_process_is_reported_in_a_line(two_processes, tmp_path, capfd):
    words = ["score", "--dataset", str(tmp_path / "gone.json"), "--scorer", "x", "--output", str(tmp_path / "out")]
    assert main([*words, "--accelerate_config", str(two_processes), "--main_process_port", "0"]) == 1
    shown = capfd.readouterr().err
    assert "gone.json: no such file or folder" in shown and "Traceback" not in shown
    assert "failed first (exit status 2); its message stands above." in shown.strip().splitlines()[-1]


def test_what_can_be_refused_is_refused_before_a_process_starts(two_processes, tmp_path, capsys):
    def failure(*words: str) -> str:
        assert main(list(words)) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    launch = ["--accelerate_config", str(two_processes)]
    assert "unknown setting --lerning_rate" in failure("instruct", "--lerning_rate", "1", *launch)
    (tmp_path / "recipe.yaml").write_text("modell: x\n")
    assert "unknown setting 'modell'" in failure("instruct", "--config", str(tmp_path / "recipe.yaml"), *launch)
    (tmp_path / "recipe.yaml").write_text("accelerate_config: ddp\n")
    assert "belongs on the command line" in failure("instruct", "--config", str(tmp_path / "recipe.yaml"))
    assert "neither a file nor one of" in failure("pretrain", "--accelerate-config=ddpp")
    assert "--accelerate_config: expected one argument" in failure("pretrain", "--accelerate_config")
    assert "--num_processes: invalid int value: 'two'" in failure("pretrain", *launch, "--num_processes", "two")
    assert "--num_processes: expected one argument" in failure("pretrain", *launch, "--num_processes")
    assert "`aligngpt chat` works in one process" in failure("chat", *launch)


def test_multi_cpu_is_refused(tmp_path):
    """accelerate takes it for a single process, without a word."""
    path = tmp_path / "cpu.yaml"
    path.write_text("distributed_type: MULTI_CPU\nnum_processes: 2\nuse_cpu: true\n")
    with pytest.raises(ValueError, match="write MULTI_GPU with use_cpu: true"):
        check_config(path, {})
    with pytest.raises(ValueError, match="write MULTI_GPU"):
        launch_words("pretrain", ["--accelerate_config", str(path)])


def test_words_go_where_they_belong():
    words = ["--config", "a.yaml", "--accelerate_config", "ddp", "--num-processes=4", "--seed", "1", "--gpu_ids", "0,1"]
    options, rest = split_words(words)
    assert options == {"accelerate_config": "ddp", "num_processes": 4, "gpu_ids": "0,1"}
    assert rest == ["--config", "a.yaml", "--seed", "1"]
