"""The `aligngpt` command. Heavy imports wait until a command is chosen, so that `aligngpt --help` answers at once."""

import argparse
import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from safetensors import SafetensorError

from aligngpt_shared.printing import printable

from .extras import check_extra
from .flags import with_known_flags


# Command -> (what does it, what it does). `module:function` takes the words behind the command; a bare `module` has
# `add_arguments(parser)` and `run(args)`.
_HERE = "aligngpt_trainers.commands"
COMMANDS = {
    "recipes": (f"{_HERE}.recipes", "list, show or copy the settings that come with this package"),
    "init": (
        f"{_HERE}.init:init_command",
        "assemble a fresh model from a language model and a vision tower",
    ),
    "score": (
        f"{_HERE}.score:score_command",
        "score image-text pairs with CLIP, cut scores into levels",
    ),
    "check": (
        f"{_HERE}.check:check_command",
        "try a stage's data, tokens and memory without training",
    ),
    "pretrain": (f"{_HERE}.train:pretrain_command", "stage 1: train projector and alignment levels"),
    "instruct": (
        f"{_HERE}.train:instruct_command",
        "stage 2: train language model, projector and gate",
    ),
    "merge": (f"{_HERE}.merge:merge_command", "merge a LoRA adapter into a model of its own"),
    "chat": (f"{_HERE}.chat", "talk with a model about images in the terminal"),
    "convert": ("aligngpt_hub.original.convert", "convert the authors' checkpoints to this format, and back"),
    "export": ("aligngpt_hub.engines.export", "write a model as a plain LLaVA, for other engines"),
    "publish": ("aligngpt_hub.publishing.model", "publish a trained model to the Hub, with code and card"),
    "publish-data": ("aligngpt_hub.publishing.dataset", "publish a scored data set to the Hub, with its card"),
    "space": ("aligngpt_hub.demo.space", "make a Gradio Space for a model"),
    "demo": ("aligngpt_hub.demo.command", "start the Gradio demo here"),
    "serve": ("aligngpt_hub.serving.command", "serve a model by an OpenAI-compatible interface"),
    "evaluate": ("aligngpt_hub.evaluation.command", "run the paper's benchmarks by lmms-eval"),
    "levels": ("aligngpt_hub.levels.command", "report what the alignment levels do in a model"),
}

# Commands that are gone -> what took their place
GONE = dict.fromkeys(("dpo", "grpo"), "TRL's own trainer tunes the model; docs/preferences.md has the script.")
GONE["republish"] = "`aligngpt convert`, then `aligngpt publish`; docs/hub.md has the lines."
GONE["judge"] = "Likelihoods judge better than levels; benchmarks/judging.py has both."

# What `--model NAME` means beside folders and Hub ids: the trained models that come with the playground, and who makes
# their folders
NAMED_MODELS = {
    "playground": "aligngpt_playground.trained:gate_model",
    "playground-steering": "aligngpt_playground.trained:steering_model",
}
# commands that show the quickstart's model, else the playground's, where none is named
SHOWS = ("chat", "demo")

USAGE = """\
usage: aligngpt [--debug] COMMAND [--config FILE.yaml] [--setting value ...]

AlignGPT (arXiv 2405.14129): a vision-language model that learns how well each image and text are aligned.

commands:
{commands}

options:
  -h, --help  this text; `aligngpt COMMAND --help` lists a command's settings
  --version   the version
  --debug     show the traceback of an error (or set ALIGNGPT_DEBUG=1)

From nothing to a published model: init, score, pretrain, instruct, chat, publish; each names the next when it ends.
Something small to try them on: `python -m aligngpt_playground make --output world` writes images with texts, and
`python -m aligngpt_playground parts` says where its tiny CLIP and language model are.

Several processes: `aligngpt COMMAND ... --accelerate_config FILE|ddp|fsdp2|zero2|zero3 [--num_processes N]`, or
`accelerate launch -m aligngpt_trainers COMMAND ...`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 0, or 2 after a one-line error about what the user gave."""
    try:
        status = _main(argv)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # whoever read the output has seen enough (`| head`); Python must not try to write the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _main(argv: Sequence[str] | None) -> int:
    # before anything imports huggingface_hub, which reads it once: TRL reports trainer, GPU and world size otherwise
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    words = list(sys.argv[1:] if argv is None else argv)
    debug = os.environ.get("ALIGNGPT_DEBUG", "0") not in ("", "0")
    if words and words[0] == "--debug":
        debug = True
        words.pop(0)
    if not words or words[0] in ("-h", "--help"):
        lines = "\n".join(f"  {name:<14}{text}" for name, (_, text) in COMMANDS.items())
        print(USAGE.format(commands=lines))
        return 0
    if words[0] == "--version":
        from importlib.metadata import version

        print(version("aligngpt"))
        return 0
    command = words.pop(0)
    if command in GONE:
        print(f"error: `aligngpt {command}` is gone: {GONE[command]}", file=sys.stderr)
        return 2
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(COMMANDS)}."
        print(f"error: unknown command {command!r}{hint}", file=sys.stderr)
        return 2
    try:
        return _run(command, words)
    except BrokenPipeError:
        raise
    except Exception as error:
        # what users can cause: values, files and missing optional packages; a full disk is safetensors' own error, and
        # of tokenizers a bare Exception
        known = (ValueError, OSError, ImportError, SafetensorError)
        if not isinstance(error, known) and "(os error" not in str(error):
            raise
        if debug:
            traceback.print_exc()
        print(printable(f"error: {_message(error)}"), file=sys.stderr)
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
    if any(word.partition("=")[0] in ("--accelerate_config", "--accelerate-config") for word in words):
        from .launch import launch_words

        return launch_words(command, words)
    target, description = COMMANDS[command]
    check_extra(command, words)
    words = with_named_model(command, words)
    name, _, function = target.partition(":")
    module = importlib.import_module(name)
    if function:
        result = getattr(module, function)(words)
        return result if isinstance(result, int) else 0
    parser = _Parser(prog=f"aligngpt {command}", description=description)
    module.add_arguments(parser)
    args = parser.parse_args(with_known_flags(words, parser))
    if hasattr(args, "load_rows"):
        from ..data.load import load_rows

        args.load_rows = load_rows
    return module.run(args) or 0


def with_named_model(command: str, words: list[str]) -> list[str]:
    """The words with the folder of a named model in its place."""
    given = [index for index, word in enumerate(words) if word == "--model" and index + 1 < len(words)]
    named = [(index + 1, words[index + 1]) for index in given]
    named += [(i, word.partition("=")[2]) for i, word in enumerate(words) if word.startswith("--model=")]
    if not named and command in SHOWS and not {"--help", "-h", "--revision"} & set(words):
        own = os.path.join("runs", "quickstart", "instruct")
        if os.path.isfile(os.path.join(own, "config.json")):
            return [*words, "--model", own]
        words, named = [*words, "--model", "playground"], [(len(words) + 1, "playground")]
    for index, name in named:
        # a checkout has a folder of that name, which is no model
        if name in NAMED_MODELS and not os.path.isfile(os.path.join(name, "config.json")):
            module, _, function = NAMED_MODELS[name].partition(":")
            folder = getattr(importlib.import_module(module), function)()
            print(f"{name}: a tiny model that knows drawings of a few hundred things, nothing else.", file=sys.stderr)
            words = [*words[:index], f"--model={folder}" if "=" in words[index] else folder, *words[index + 1 :]]
    return words


class _Parser(argparse.ArgumentParser):
    """argparse whose errors reach `main` as ValueError."""

    def error(self, message: str):
        raise ValueError(f"{message}. `{self.prog} --help` lists the options.")
