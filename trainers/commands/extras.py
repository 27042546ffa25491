"""Which extra of this package a command needs, and one line about what is missing or of another version."""

import importlib.util
import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


PACKAGE = "aligngpt"
# Command -> its extra; the others (chat, convert, space without --push) need the core alone.
EXTRAS = {
    **dict.fromkeys(("init", "score", "check", "pretrain", "instruct", "merge"), "train"),
    **dict.fromkeys(("export", "publish", "publish-data", "levels"), "train"),
    "evaluate": "eval",
    "demo": "demo",
    "serve": "serve",
}
# What may stand behind `report_to` -> module; each is an extra of the same name.
LOGGERS = ("tensorboard", "trackio", "wandb")


def requirements_of(extra: str | None) -> list[Requirement]:
    """What an extra (or the core, `None`) asks for, those of other extras that it names included."""
    found = []
    for requirement in map(Requirement, requires(PACKAGE) or ()):
        marker = requirement.marker
        if marker is not None and not marker.evaluate({"extra": extra or ""}):
            continue
        if marker is None and extra is not None:
            continue
        if canonicalize_name(requirement.name) == PACKAGE:
            found += [inner for name in requirement.extras for inner in requirements_of(name)]
        else:
            found.append(requirement)
    return found


def check_extra(command: str, words: Sequence[str] = ()) -> None:
    """
    Refuses a command whose packages are not there, or not as this version of the project was tested with.

    Args:
        command, words: the command and what stands behind it; another engine brings packages of its own, what is sent
            is scanned.

    Raises:
        ImportError: naming the packages, the versions found and wanted, and what to install.
    """
    extra = EXTRAS.get(command)
    if command == "serve" and "vllm" in " ".join(words).replace("=", " ").split():
        extra = None
    elif command == "space" and "--push" in words:
        extra = "train"
    if wrong := missing_packages(extra):
        name = "." if extra is None else f".[{extra}]"
        raise ImportError(f'`aligngpt {command}` needs {", ".join(wrong)}: pip install "{name}" in a checkout.')


def missing_packages(extra: str | None) -> list[str]:
    """What an extra (or the core, `None`) asks for and does not find; each with the version that is wanted."""
    wrong = []
    for requirement in requirements_of(extra):
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement.name}{_range(requirement)} (not installed)")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name}{_range(requirement)} ({found} is installed)")
    return wrong


def _range(requirement: Requirement) -> str:
    # the newest bounds alone: a list of releases left out says nothing here
    bounds = [str(part) for part in requirement.specifier if part.operator != "!="]
    return f" {','.join(sorted(bounds, reverse=True))}" if bounds else ""


def check_loggers(names: list[str]) -> None:
    """
    Refuses a `report_to` whose package is missing, and W&B where it does not know who reports.

    Raises:
        ImportError: naming it and what to install.
        ValueError: W&B has no key and is not told to stay offline.
    """
    for name in names:
        if name in LOGGERS and importlib.util.find_spec(name) is None:
            raise ImportError(f"report_to: {name} needs the package {name}: pip install {name}.")
    if "wandb" in names and os.environ.get("WANDB_MODE", "online") not in ("offline", "disabled", "dryrun"):
        import wandb

        try:
            known = wandb.login(prompt=False)
        except Exception as error:  # its own kinds, for a refused key and for no connection
            raise ValueError(f"report_to: wandb: {error} WANDB_MODE=offline keeps everything here.") from error
        if not known:
            raise ValueError("report_to: wandb has no key: run `wandb login`, or set WANDB_MODE=offline.")
