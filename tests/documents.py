"""Commands and code blocks of our documents, and the parsers that the real commands use."""

import argparse
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from aligngpt_trainers.commands import check as check_command
from aligngpt_trainers.commands.cli import COMMANDS, _Parser
from aligngpt_trainers.commands.flags import LAUNCHABLE, with_known_flags
from aligngpt_trainers.commands.init import InitArguments
from aligngpt_trainers.commands.launch import find_config, split_words
from aligngpt_trainers.commands.merge import MergeArguments
from aligngpt_trainers.commands.settings import check_settings
from aligngpt_trainers.commands.train import STAGES
from aligngpt_trainers.scoring.config import ScoreConfig


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "AGENTS.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += [path for folder in ("recipes", "playground") for path in sorted((ROOT / folder).rglob("*.md"))]
SETTINGS = {"score": (ScoreConfig,), "init": (InitArguments,), "merge": (MergeArguments,)}
# What else a shell is asked for; each is another project's, or the shell's own.
FOREIGN = (
    "hf",
    "curl",
    "cd",
    "export",
    "source",
    "sbatch",
    "wget",
    "unzip",
    "tar",
    "mkdir",
    "mv",
    "git",
    "lmms-eval",
    "llama-mtmd-cli",
)
# of llama.cpp's sources
FOREIGN_SCRIPTS = ("convert_hf_to_gguf.py",)


def blocks(text: str, *languages: str) -> Iterator[str]:
    """Fenced blocks of a page."""
    for language, body in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if language in languages:
            yield body


def commands(text: str) -> Iterator[str]:
    """Lines of a page's shell blocks, continued ones joined, here-documents left out."""
    for body in blocks(text, "bash", "sh"):
        body = re.sub(r"<<-?\s*'?(\w+)'?(.*?)\n.*?^\1$", r"\2", body, flags=re.MULTILINE | re.DOTALL)
        for line in re.sub(r"\\\n\s*", " ", body).splitlines():
            for part in re.split(r"\s&&\s", line):
                if part.strip() and not part.strip().startswith("#"):
                    yield part.strip()


def mentioned(text: str) -> Iterator[str]:
    """`aligngpt ...` in running text, and in the comments of settings."""
    for found in re.findall(r"`(aligngpt [^`]+)`", text):
        yield " ".join(found.split())


def in_comments(text: str) -> Iterator[str]:
    """Commands in the comments of a YAML file."""
    lines = re.sub(r"\\\n#\s*", " ", text)
    yield from re.findall(r"^# *(?:[^`\n]*: )?(aligngpt .+)$", lines, re.MULTILINE)


def words_of(line: str) -> list[str]:
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"\w+=.*", words[0]):  # variables in front
        words.pop(0)
    return [word for word in words if word != "&"]


def parse_line(line: str) -> None:
    """
    Gives a line of a shell block to the parser that would read it.

    Raises:
        ValueError, SystemExit: it would be refused.
    """
    words = words_of(line)
    if not words or words[0] in FOREIGN or "$(" in line.split()[0]:
        return
    if words[0] == "aligngpt":
        parse_command(words[1:])
    elif words[0] == "accelerate":
        parse_command(words[words.index("aligngpt_trainers") + 1 :])
    elif words[0] == "pip":
        _check_install(words)
    elif words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= {*targets}, line
    elif words[:2] == ["python", "-m"] and words[2] == "aligngpt_playground":
        importlib.import_module("aligngpt_playground.__main__").build_parser().parse_args(words[3:])
    elif words[:2] in (["python", "-m"], ["python3", "-m"]):
        assert words[2] in ("build", "venv", "pip"), line
    elif words[0] == "python" and words[1] in FOREIGN_SCRIPTS:
        return
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file(), line
    else:
        raise ValueError(f"{words[0]}: not a command that this project knows")


def _check_install(words: list[str]) -> None:
    from importlib.metadata import metadata

    extras = set(metadata("aligngpt").get_all("Provides-Extra"))
    for word in words:
        if match := re.fullmatch(r"(?:aligngpt\S*|\.)\[([\w,]+)\]", word):
            assert set(match[1].split(",")) <= extras, word


def parse_command(words: list[str]) -> None:
    """What `aligngpt WORDS` would make of them before it does anything."""
    words = list(words)
    if words[0] in ("--debug", "--version", "--help"):
        words.pop(0)
    if not words:
        return
    command = words.pop(0)
    if command not in COMMANDS:
        raise ValueError(f"unknown command {command!r}")
    if any(word.partition("=")[0].replace("-", "_") == "__accelerate_config" for word in words):
        if command not in LAUNCHABLE:
            raise ValueError(f"aligngpt {command} works in one process")
        told, words = split_words(words)
        find_config(told["accelerate_config"])
    if command == "check":
        parser = check_command._parser()
        parser.error = _refuse
        own, words = parser.parse_known_args(with_known_flags(words, parser))
        words = ["--config", own.config, *words] if own.config is not None else words
        _parse_settings(own.stage or check_command.recognise_stage(words), words)
    elif command in STAGES or command in SETTINGS:
        _parse_settings(command, words)
    else:
        _module_parser(command).parse_args(with_known_flags(words, _module_parser(command)))


def _module_parser(command: str) -> argparse.ArgumentParser:
    parser = _Parser(prog=f"aligngpt {command}")
    importlib.import_module(COMMANDS[command][0]).add_arguments(parser)
    return parser


def _parse_settings(command: str, words: list[str]) -> None:
    kinds = STAGES[command][1] if command in STAGES else SETTINGS[command]
    parser, words = check_settings(f"aligngpt {command}", kinds, words)
    # argparse takes a default from YAML for given, but not where a setting is required
    parsed, rest = parser.parse_known_args(words)
    if rest:
        raise ValueError(f"left over: {rest}")
    if command in STAGES and parsed.dataset is None:
        raise ValueError("dataset is missing")


def _refuse(message: str):
    raise ValueError(message)


def check_mention(text: str) -> None:
    """A command in running text: the command exists, and so do its flags; words in capitals stand for values."""
    words = [word for word in words_of(text.replace("...", "")) if word != "aligngpt"]
    words = [word for word in words if word != "--debug"]
    if not words or words[0].isupper() or words[0].startswith("-"):
        return
    assert words[0] in COMMANDS, text
    command = words[0]
    if command in (*STAGES, *SETTINGS):
        kinds = STAGES[command][1] if command in STAGES else SETTINGS[command]
        parser, _ = check_settings(command, kinds, [])
    else:
        parser = check_command._parser() if command == "check" else _module_parser(command)
    known = {flag.replace("_", "-") for flag in parser._option_string_actions}
    known |= {"--accelerate-config", "--num-processes", "--help-all", "--on-bad-row", "--config"}
    for word in words[1:]:
        flag = word.partition("=")[0].replace("_", "-")
        assert not flag.startswith("--") or flag in known, f"{text}: {word}"
