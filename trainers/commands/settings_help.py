"""`--help` of the commands whose settings are dataclasses: ours first, in groups; `--help-all` for all of TRL's."""

import argparse
import copy
import dataclasses
import inspect
import textwrap
from collections.abc import Sequence

from .flags import LAUNCHABLE


# Settings of TRL and transformers that a first run sets; the others stand behind --help-all.
COMMON = (
    *("output_dir", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("learning_rate", "optim", "bf16", "gradient_checkpointing", "seed", "dataloader_num_workers", "logging_steps"),
    *("save_strategy", "save_steps", "eval_strategy", "eval_steps", "report_to", "use_cpu"),
)
ALIGNMENT = ("num_align_levels", "align_mode", "default_align_level", "gate_context", "allow_unaligned")
# What a group begins with.
FIRST = {name: place for place, name in enumerate(("language_model", "vision_tower", "model", "dataset", "output_dir"))}
LAUNCH = """\
several processes:
  --accelerate_config NAME|FILE [--num_processes N]
                        one_gpu, ddp, fsdp2, zero2, zero3, or a file of accelerate's (`aligngpt recipes` lists ours)
"""


def settings_help(
    parser: argparse.ArgumentParser, kinds: Sequence[type], command: str, everything: bool = False
) -> str:
    """
    The help of a command.

    Args:
        parser: with one action for each field.
        kinds: the dataclasses that the fields are of.
        command: its name, such as `pretrain`.
        everything: list the settings of TRL and transformers, too.
    """
    owners = {field.name: _owner(kind, field.name) for kind in kinds for field in dataclasses.fields(kind)}
    groups: dict[str, list[argparse.Action]] = {}
    hidden = 0
    is_stage = any("TrainingArguments" in _bases(kind) for kind in kinds)
    for action in parser._actions:
        if any(option.startswith("--no_") and option[5:] == action.dest for option in action.option_strings):
            continue  # the opposite of a switch: `--switch false` says it too
        group = _group(action.dest, owners.get(action.dest), is_stage)
        if group is None:
            hidden += 1
            group = "TRL and transformers"
            if not everything:
                continue
        groups.setdefault(group, []).append(action)
    shown = argparse.ArgumentParser(
        prog=parser.prog,
        add_help=False,
        description=parser.description,
        usage=f"{parser.prog} [--config FILE.yaml|NAME] [--setting value ...]",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=110),
    )
    order = ["options", "model", "data", "alignment", "training", "LoRA", "settings", "TRL and transformers"]
    for name in sorted(groups, key=order.index):
        section = shown.add_argument_group(name)
        for action in sorted(groups[name], key=lambda action: FIRST.get(action.dest, len(FIRST))):
            section._add_action(_displayed(action))
    text = shown.format_help()
    if command in LAUNCHABLE:
        text += f"\n{LAUNCH}"
    if hidden and not everything:
        note = f"{hidden} more settings of TRL's SFTConfig and transformers' TrainingArguments: --help-all."
        text += "\n" + textwrap.fill(note, 110) + "\n"
    return text + "\nHyphens and underscores are the same in names of settings."


def _owner(kind: type, name: str) -> type:
    """The class that says what a field is: the first that annotates it."""
    return next(cls for cls in kind.__mro__ if name in inspect.get_annotations(cls))


def _group(name: str, owner: type | None, is_stage: bool) -> str | None:
    """Where a setting is listed; `None` for those of TRL and transformers that a first run leaves alone."""
    if owner is None:
        return "options"
    if not is_stage:
        return "settings"
    if name in ALIGNMENT:
        return "alignment"
    if name in COMMON:
        return "training"
    if not owner.__module__.startswith("aligngpt_trainers"):
        return None
    named = {"DataArguments": "data", "LoraArguments": "LoRA", "ModelArguments": "model"}
    kinds = {**named, "PretrainModelArguments": "model"}
    return kinds.get(owner.__name__, "training")


def _bases(owner: type) -> set[str]:
    return {cls.__name__ for cls in owner.__mro__}


def _displayed(action: argparse.Action) -> argparse.Action:
    """An action as it is listed: one spelling of each name, and whether it must be given."""
    shown = copy.copy(action)
    spellings = {option.replace("-", "_"): option for option in reversed(action.option_strings)}
    shown.option_strings = list(reversed(spellings.values()))
    if action.choices is not None and len(list(action.choices)) > 8:
        shown.choices, shown.metavar = None, action.dest.upper()
    if action.help is not argparse.SUPPRESS:
        default = action.default
        says = (
            f" (default: {default})" if default not in (None, [], argparse.SUPPRESS, "") and action.nargs != 0 else ""
        )
        text = (action.help or "").replace(" (default: %(default)s)", "").strip()
        shown.help = f"{text}{' (required)' if action.required else says.replace('%', '%%')}"
    shown.required = False
    return shown
