"""The `aligngpt` command. Heavy imports wait until a command is chosen, so that `aligngpt --help` answers at once."""

import argparse
import difflib
import os
import sys
import traceback
from collections.abc import Sequence


COMMANDS = {
    "score": "score image-text pairs with CLIP and cut the scores into alignment levels",
    "pretrain": "stage 1: train projector and alignment levels on scored pairs",
    "instruct": "stage 2: train language model, projector and gate on conversations",
    "chat": "talk with a model about pictures in the terminal",
    "convert": "convert the authors' checkpoints to this format, and back",
}

USAGE = """\
usage: aligngpt [--debug] COMMAND [--config FILE.yaml] [--setting value ...]

AlignGPT (arXiv 2405.14129): a vision-language model that learns how well each picture and text are aligned.

commands:
{commands}

options:
  -h, --help  this text; `aligngpt COMMAND --help` lists a command's settings
  --version   the version
  --debug     show the traceback of an error (or set ALIGNGPT_DEBUG=1)

Several processes: `accelerate launch -m aligngpt_trainers COMMAND ...`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 0, or 2 after a one-line error about what the user gave."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = os.environ.get("ALIGNGPT_DEBUG", "0") not in ("", "0")
    if words and words[0] == "--debug":
        debug = True
        words.pop(0)
    if not words or words[0] in ("-h", "--help"):
        lines = "\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items())
        print(USAGE.format(commands=lines))
        return 0
    if words[0] == "--version":
        from importlib.metadata import version

        print(version("aligngpt"))
        return 0
    command = words.pop(0)
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(COMMANDS)}."
        print(f"error: unknown command {command!r}{hint}", file=sys.stderr)
        return 2
    try:
        return _run(command, words)
    # what users can cause: values, files and missing optional packages
    except (ValueError, OSError, ImportError) as error:
        if debug:
            traceback.print_exc()
        print(f"error: {_message(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped.", file=sys.stderr)
        return 130


def _message(error: Exception) -> str:
    """What an error says; torch puts the traceback of a data loader's process in front of it."""
    text = str(error)
    if "in DataLoader worker process" in text:
        text = text.strip().splitlines()[-1].removeprefix(f"{type(error).__name__}: ")
    return text


def _run(command: str, words: list[str]) -> int:
    if command in ("pretrain", "instruct"):
        from . import train

        {"pretrain": train.pretrain_command, "instruct": train.instruct_command}[command](words)
    elif command == "score":
        from . import train

        train.score_command(words)
    else:
        parser = _Parser(prog=f"aligngpt {command}", description=COMMANDS[command])
        if command == "chat":
            from . import chat as module
        else:
            from aligngpt_hub import convert as module
        module.add_arguments(parser)
        return module.run(parser.parse_args(words)) or 0
    return 0


class _Parser(argparse.ArgumentParser):
    """argparse whose errors reach `main` as ValueError."""

    def error(self, message: str):
        raise ValueError(f"{message}. `{self.prog} --help` lists the options.")
