"""The files of recipes/accelerate, read by accelerate's own loader and launcher. DeepSpeed itself is not run."""

from argparse import Namespace
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType

from aligngpt_trainers.commands.launch import check_config, find_config


FOLDER = Path(__file__).parents[2] / "recipes" / "accelerate"
KINDS = {
    "one_gpu": DistributedType.NO,
    "ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "fsdp2_sharded": DistributedType.FSDP,
    "zero2": DistributedType.DEEPSPEED,
    "zero3": DistributedType.DEEPSPEED,
}


def launched(name: str, *words: str) -> Namespace:
    """What accelerate's launcher would go by."""
    args = launch_command_parser().parse_args(["--config_file", str(FOLDER / f"{name}.yaml"), *words, "script.py"])
    return _validate_launch_command(args)[0]


def test_all_are_named():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_it(name):
    """Unknown keys make accelerate's loader fail."""
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert config.distributed_type == KINDS[name]
    assert (config.num_processes, config.mixed_precision) == (1 if name == "one_gpu" else 8, "bf16")
    assert launched(name, "--num_processes", "2").num_processes == 2


def test_fsdp_is_the_second_generation():
    args = launched("fsdp2")
    assert args.use_fsdp and not args.use_deepspeed
    # accelerate leaves the file's type, number or text, as it stands
    assert str(args.fsdp_version) == "2" and args.fsdp_auto_wrap_policy == "TRANSFORMER_BASED_WRAP"
    assert str(args.fsdp_state_dict_type) == "FULL_STATE_DICT"


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_stage(stage):
    args = launched(f"zero{stage}")
    assert args.use_deepspeed and int(args.zero_stage) == stage
    assert str(args.zero3_init_flag).lower() == str(stage == 3).lower()


def test_missing_hardware_is_said_before_anything_starts(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="asks for 8 processes and there are 2 GPUs: add --num_processes"):
        check_config(FOLDER / "ddp.yaml", {})
    check_config(FOLDER / "ddp.yaml", {"num_processes": 2})
    monkeypatch.setattr("accelerate.utils.is_deepspeed_available", lambda: False)
    with pytest.raises(ImportError, match=r"zero2\.yaml asks for DeepSpeed"):
        check_config(FOLDER / "zero2.yaml", {"num_processes": 2})


def test_names_are_ours_and_never_trls(monkeypatch, tmp_path):
    """Anywhere: the file that comes with this package, or one by its path; TRL's files of other names do not count."""
    monkeypatch.chdir(tmp_path)
    for name in KINDS:
        assert find_config(name).samefile(FOLDER / f"{name}.yaml")
    (tmp_path / "own.yaml").write_text("distributed_type: 'NO'\n")
    assert find_config("own.yaml") == Path("own.yaml")
    for name in ("zero4", "multi_gpu", "zero1"):
        with pytest.raises(
            ValueError, match=r"neither a file nor one of ddp, fsdp2, fsdp2_sharded, one_gpu, zero2, zero3\."
        ):
            find_config(name)
