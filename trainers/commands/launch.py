"""
`--accelerate_config NAME|FILE`: a command in several processes, by accelerate's own launcher.

    aligngpt pretrain --config vicuna-7b/pretrain --accelerate_config zero2 --num_processes 4

does what `accelerate launch --config_file zero2.yaml --num_processes 4 -m aligngpt_trainers pretrain --config
vicuna-7b/pretrain` would, after the settings have been checked once.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .flags import LAUNCHABLE, with_known_flags
from .recipes import accelerate_names, find_accelerate
from .settings import read_yaml


# What may stand behind `--accelerate_config`; accelerate's launcher says what each of them does.
COUNTS = ("num_processes", "num_machines", "machine_rank", "main_process_port")
LAUNCH_OPTIONS = (*COUNTS, "main_process_ip", "gpu_ids", "rdzv_backend", "same_network")


def split_words(words: Sequence[str]) -> tuple[dict[str, str | int], list[str]]:
    """What accelerate's launcher is told, `accelerate_config` among it, and the command's own words."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = _refuse
    parser.add_argument("--accelerate_config", required=True)
    for name in LAUNCH_OPTIONS:
        parser.add_argument(f"--{name}", type=int if name in COUNTS else str)
    given, rest = parser.parse_known_args(with_known_flags(words, parser))
    return {name: value for name, value in vars(given).items() if value is not None}, rest


def _refuse(message: str):
    raise ValueError(f"{message}.")


def find_config(name: str) -> Path:
    """
    The file of accelerate's settings that is meant: a path, or the name of one that comes with this package.

    Raises:
        ValueError: there is none; says which names there are.
    """
    if Path(name).is_file():
        return Path(name)
    if (found := find_accelerate(name)) is not None:
        return found
    raise ValueError(f"accelerate_config {name!r} is neither a file nor one of {', '.join(accelerate_names())}.")


def check_config(path: Path, told: dict[str, Any]) -> None:
    """
    Refuses files that accelerate would fail on later, or silently run in another way.

    Raises:
        ValueError: more processes than GPUs; `MULTI_CPU`, which starts a single process.
        ImportError: DeepSpeed is asked for and missing.
    """
    from accelerate.utils import is_deepspeed_available

    settings = read_yaml(path)
    kind = str(settings.get("distributed_type", "NO"))
    if kind == "DEEPSPEED" and not is_deepspeed_available():
        raise ImportError(f'{path} asks for DeepSpeed: `pip install ".[deepspeed]"` in a checkout, or use fsdp2.')
    if kind == "MULTI_CPU":
        raise ValueError(
            f"{path}: distributed_type MULTI_CPU starts a single process; write MULTI_GPU with use_cpu: true."
        )
    import torch

    told = {**settings, **told}
    count = int(told.get("num_processes") or 1)
    gpus = torch.cuda.device_count() * int(told.get("num_machines") or 1)
    if not settings.get("use_cpu") and count > max(gpus, 1):
        raise ValueError(
            f"{path} asks for {count} processes and there {'is' if gpus == 1 else 'are'} {gpus} GPU{'s'[: gpus != 1]}: "
            "add --num_processes, and multiply gradient_accumulation_steps so that the total batch stays what it was."
        )


def launch_words(command: str, words: Sequence[str]) -> int:
    """
    Runs a command whose words hold `--accelerate_config`.

    Returns:
        The exit status: 0, or 1 when a process failed.

    Raises:
        ValueError: a command that works in one process, an unknown setting, an unusable file.
    """
    if command not in LAUNCHABLE:
        raise ValueError(f"`aligngpt {command}` works in one process: leave --accelerate_config out.")
    told, words = split_words(words)
    config = find_config(told.pop("accelerate_config"))
    check_config(config, told)
    if command in ("pretrain", "instruct"):
        from .train import check_words

        # once here, or every process would say the same
        check_words(command, words)
    return launch(command, words, config, [f"--{name}={value}" for name, value in told.items()])


def launch(command: str, words: Sequence[str], config: Path, launch_words: Sequence[str] = ()) -> int:
    """
    Runs `aligngpt COMMAND WORDS` in the processes that a file of accelerate's asks for.

    Returns:
        0, or 1 when a process failed; what went wrong stands in its own message.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    arguments = ["--config_file", str(config), *launch_words, "-m", "aligngpt_trainers", command, *words]
    try:
        launch_command(launch_command_parser().parse_args(arguments))
    except (ChildFailedError, subprocess.CalledProcessError) as error:
        print(f"error: {_failure(error)}; its message stands above.", file=sys.stderr)
        return 1
    return 0


def _failure(error: Any) -> str:
    failures = getattr(error, "failures", None)
    if not failures:
        return "the process failed"
    rank, failure = min(failures.items(), key=lambda item: item[1].timestamp)
    return f"process {failure.local_rank if failure else rank} failed first (exit status {failure.exitcode})"
