"""What holds for the repository as a whole."""

import re
import subprocess
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from aligngpt_trainers.commands.cli import COMMANDS, main


ROOT = Path(__file__).parents[1]
PACKAGES = {
    "modeling_aligngpt": "modeling_aligngpt",
    "aligngpt_trainers": "trainers",
    "aligngpt_hub": "hub",
    "aligngpt_playground": "playground",
    "aligngpt_recipes": "recipes",
}
# extras that the tests do not install: one builds for minutes, the other asks for an account
NOT_INSTALLED_HERE = ("deepspeed", "wandb")


def project_files(*suffixes: str) -> list[Path]:
    """Files of the project (what git knows, or everything where there is no git)."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        files = [ROOT / name for name in listed]
    except (OSError, subprocess.CalledProcessError):
        files = [path for path in ROOT.rglob("*") if ".venv" not in path.parts and "runs" not in path.parts]
    return [path for path in files if path.is_file() and (not suffixes or path.suffix in suffixes)]


def test_the_installed_names_are_used_everywhere():
    bare = re.compile(r"^\s*(?:from|import) +(trainers|hub|playground)\b", re.MULTILINE)
    found = {
        str(path.relative_to(ROOT)): match.group(0).strip()
        for path in project_files(".py", ".md", ".jinja")
        for match in bare.finditer(path.read_text(encoding="utf-8"))
    }
    assert not found, f"use the installed names (aligngpt_trainers, ...): {found}"


def test_packages_are_where_they_say():
    for package, folder in PACKAGES.items():
        module = __import__(package)
        assert Path(module.__file__).parent == ROOT / folder


def test_who_may_know_whom():
    """modeling knows nobody; trainers and hub know modeling only (the command line reaches hub)."""
    allowed = {
        "modeling_aligngpt": set(),
        "aligngpt_trainers": {"modeling_aligngpt", "aligngpt_recipes"},
        "aligngpt_hub": {"modeling_aligngpt"},
        "aligngpt_playground": {"modeling_aligngpt", "aligngpt_trainers"},
        "aligngpt_recipes": set(),
    }
    imports = re.compile(rf"^\s*(?:from|import) +({'|'.join(PACKAGES)})\b", re.MULTILINE)
    for package, folder in PACKAGES.items():
        for path in (ROOT / folder).rglob("*.py"):
            if path.name == "cli.py":
                continue
            known = set(imports.findall(path.read_text(encoding="utf-8"))) - {package}
            assert known <= allowed[package], f"{path.relative_to(ROOT)} imports {known - allowed[package]}"


def test_files_stay_readable():
    long = {
        str(path.relative_to(ROOT)): lines
        for path in project_files(".py")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > (600 if "tests" in path.parts else 500)
    }
    assert not long, f"split these by concept: {long}"


def test_nothing_big_or_foreign_is_tracked():
    for path in project_files():
        assert path.stat().st_size < 10 * 2**20, path
        assert path.suffix not in {".pt", ".pkl", ".gguf"}, path
    sizes = {path: path.stat().st_size for path in (ROOT / "playground" / "parts").rglob("*.safetensors")}
    trained = sum(size for path, size in sizes.items() if path.parent.name == "trained")
    assert 0 < trained < 8 * 2**20 and 0 < sum(sizes.values()) - trained < 12 * 2**20


def test_constraints_hold_what_pyproject_allows():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines if line and not line.startswith("#"))
    wanted = [*project["dependencies"]]
    wanted += [line for extra in project["optional-dependencies"] for line in project["optional-dependencies"][extra]]
    for line in wanted:
        requirement = Requirement(line)
        if requirement.name in ("aligngpt", *NOT_INSTALLED_HERE):
            continue
        name = requirement.name.lower().replace("_", "-")
        assert name in pins, f"{requirement.name} has no tested version in constraints.txt"
        assert requirement.specifier.contains(pins[name]), f"{line} does not allow the tested {pins[name]}"


def test_the_command_is_installed():
    (command,) = [entry for entry in entry_points(group="console_scripts") if entry.name == "aligngpt"]
    assert command.load()(["--version"]) == 0


def test_every_command_has_its_help(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        assert f"usage: aligngpt {command}" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["make quickstart", "make test"])
def test_readme_commands_exist(command):
    assert command in (ROOT / "README.md").read_text(encoding="utf-8")
    dry_run = subprocess.run(["make", "-n", *command.split()[1:]], cwd=ROOT, capture_output=True, text=True)
    assert dry_run.returncode == 0, dry_run.stderr
    expected = "aligngpt_playground quickstart" if "quickstart" in command else "pytest"
    assert expected in dry_run.stdout
