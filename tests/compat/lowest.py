"""
`make lowest`: the lowest releases that pyproject.toml allows, in environments of their own. torch alone stays at the
tested version: older CPU builds are not on the package index.

Two sets: the core (transformers 4.57, pillow 10), where a saved model loads and answers as on the newest; and the core
with `train`, where the model's and the trainers' tests run.
"""

import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from packaging.requirements import Requirement


ROOT = Path(__file__).parents[2]
TESTS = ["tests/modeling", "tests/parity", "tests/trainers/test_pretrain.py", "tests/trainers/test_instruct.py"]
TESTS += ["tests/trainers/test_resume.py", "tests/trainers/test_alignment.py", "tests/trainers/test_lora.py"]


def lowest(*groups: str) -> list[str]:
    """`name==lowest bound` of every requirement of the core (`core`) and extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = {"core": project["dependencies"], **project["optional-dependencies"]}
    pins: dict[str, str] = {}
    for requirement in (Requirement(line) for group in groups for line in wanted[group]):
        bounds = [part.version for part in requirement.specifier if part.operator == ">="]
        if bounds and requirement.name != "torch":
            extras = f"[{','.join(requirement.extras)}]" if requirement.extras else ""
            pins[requirement.name] = f"{requirement.name}{extras}=={bounds[0]}"
    return list(pins.values())


def run(command: list, **variables: str) -> int:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    print("$", *command, flush=True)
    return subprocess.run(
        list(map(str, command)), cwd=ROOT, env={**kept, **variables}, stdin=subprocess.DEVNULL
    ).returncode


def make_environment(folder: Path, *wanted: str) -> Path:
    python = folder / "bin" / "python"
    torch = re.search(r"^torch==\S+", (ROOT / "constraints.txt").read_text(), re.MULTILINE).group()
    for command in (
        [sys.executable, "-m", "venv", folder],
        [python, "-m", "pip", "install", "--quiet", torch],
        [python, "-m", "pip", "install", "--quiet", *wanted, "pytest", "pytest-xdist", "requests"],
        [python, "-m", "pip", "install", "--quiet", "--no-deps", "-e", ROOT],
    ):
        if run(command):
            raise SystemExit("the lowest versions cannot be installed: a bound is too low")
    return python


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        core, train = lowest("core"), lowest("core", "train", "playground")
        transformers = next(pin for pin in core if pin.startswith("transformers=="))
        print("core:", *core, "\ntrain:", *train, flush=True)
        pillow = next(pin for pin in core if pin.startswith("pillow=="))
        probe = [sys.executable, Path(__file__).with_name("run.py"), "--pillow", pillow, "--versions"]
        first = run([*probe, transformers.partition("==")[2], "5.24.0"])
        python = make_environment(Path(name) / "train", *train)
        second = run([python, "-m", "pytest", "-n", "2", "--dist", "loadfile", "-q", *TESTS], OMP_NUM_THREADS="1")
    print(f"{2 - bool(first) - bool(second)} passed, {bool(first) + bool(second)} failed")
    return 1 if first or second else 0


if __name__ == "__main__":
    sys.exit(main())
