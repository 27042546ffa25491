"""Settings of a command from a YAML file and the command line, with errors that say what to write instead."""

import argparse
import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from trl import TrlParser

from .flags import with_known_flags
from .foreign_flags import other_name
from .settings_help import settings_help


class UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which refuses a key that stands twice instead of keeping the last."""

    def construct_mapping(self, node, deep=False):
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise ValueError(f"line {key_node.start_mark.line + 1}: the key {key!r} stands twice.")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


class SettingsParser(TrlParser):
    """TRL's parser (`--config FILE.yaml`, then overrides) with errors raised as ValueError."""

    def error(self, message: str):
        raise ValueError(f"{message}. `{self.prog} --help` lists the settings.")


def parse_settings(
    prog: str, dataclass_types: Sequence[type], argv: Sequence[str], description: str | None = None
) -> tuple[Any, ...]:
    """
    Dataclass instances from `--config FILE.yaml` and `--key value` overrides.

    Args:
        prog: name of the command in help and errors.
        dataclass_types: what the settings fill, in order.
        argv: the words after the command.
        description: for `--help`.

    Raises:
        ValueError: naming file and key: unknown keys (with the nearest valid name), keys that stand twice, values of
            another kind than the setting, YAML's `no` and `yes` where text is meant.
    """
    parser, words = check_settings(prog, dataclass_types, argv, description)
    parsed = parser.parse_args_into_dataclasses(args=words, look_for_args_file=False)
    return tuple(parsed[: len(dataclass_types)])


def check_settings(
    prog: str, dataclass_types: Sequence[type], argv: Sequence[str], description: str | None = None
) -> tuple[SettingsParser, list[str]]:
    """
    The first half of [`parse_settings`], which makes none of the dataclasses (those of a training ask for the GPU).

    Returns:
        The parser, with the YAML file's values as defaults, and the words that are left.

    Raises:
        ValueError: as `parse_settings`, but for what the dataclasses find out themselves.
    """
    parser = SettingsParser(dataclass_types, prog=prog, description=description, allow_abbrev=False)
    hints = {name: hint for kind in dataclass_types for name, hint in typing.get_type_hints(kind).items()}
    names = {action.dest: action for action in parser._actions if action.dest != "help"}
    # not an argument for TrlParser, which takes it out before argparse sees it: here for --help and typos
    parser.add_argument("--config", metavar="FILE.yaml", help="Settings in YAML; the command line overrides them.")
    parser.add_argument("--help-all", action="store_true", help="All settings, TRL's and transformers' too.")
    words = list(argv)
    words = with_known_flags(words, parser)
    _check_flags(parser, words)
    if help_words := {"-h", "--help", "--help-all"}.intersection(words):
        print(settings_help(parser, dataclass_types, prog.split()[-1], everything="--help-all" in help_words))
        raise SystemExit(0)
    config_path = _take_config(words)
    if config_path is not None:
        config = _by_field(config_path, read_yaml(config_path), parser)
        for key, value in config.items():
            if key == "accelerate_config":
                raise ValueError(f"{config_path}: accelerate_config belongs on the command line: --accelerate_config.")
            if key not in names:
                raise ValueError(
                    f"{config_path}: unknown setting {key!r}{other_name(str(key), names) or nearest(key, names)}."
                )
            config[key] = _checked_value(config_path, key, value, names[key], hints.get(key))
        parser.set_defaults_with_config(**config)
    return parser, words


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file holds."""
    path = find_settings(str(path))
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}, {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold settings, one `key: value` a line.")
    return config


def find_settings(name: str) -> Path:
    """A YAML file by its path, or one of the recipes that come with this package by name (`vicuna-7b/pretrain`)."""
    from .recipes import find_recipe, recipe_names

    path = Path(name) if Path(name).is_file() else find_recipe(name)
    if path is None:
        known = recipe_names()
        raise ValueError(
            f"--config {name}: there is no such file, and no recipe of that name{nearest(name, known)} "
            "(`aligngpt recipes` lists them)."
        )
    return path


def nearest(name: str, valid: typing.Iterable[str]) -> str:
    """`; did you mean ...?` when a valid name is close."""
    close = difflib.get_close_matches(str(name), list(valid), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def _by_field(path: str, config: dict[str, Any], parser: argparse.ArgumentParser) -> dict[str, Any]:
    """A YAML file's settings under the names of the fields they set; an alias is another name of one."""
    fields = {option.lstrip("-").replace("-", "_"): a.dest for a in parser._actions for option in a.option_strings}
    named: dict[str, str] = {}
    for key in config:
        field = fields.get(str(key).replace("-", "_"), key)
        if field in named:
            raise ValueError(f"{path}: {named[field]} and {key} are one setting: leave one of them out.")
        named[field] = key
    return {field: config[key] for field, key in named.items()}


def _take_config(words: list[str]) -> str | None:
    """Takes `--config FILE` or `--config=FILE` out of the words."""
    for index, word in enumerate(words):
        if word == "--config":
            if index + 1 == len(words):
                raise ValueError("--config needs a file: --config FILE.yaml.")
            words.pop(index)
            return words.pop(index)
        if word.startswith("--config="):
            return words.pop(index).partition("=")[2]
    return None


def _check_flags(parser: argparse.ArgumentParser, words: Sequence[str]):
    for word in words:
        flag = word.partition("=")[0]
        if flag.startswith("--") and flag not in parser._option_string_actions:
            valid = parser._option_string_actions
            raise ValueError(f"unknown setting {flag}{other_name(flag, valid) or nearest(flag, valid)}.")


def _checked_value(path: str, key: str, value: Any, action: argparse.Action, hint: Any) -> Any:
    """A YAML value fit for the setting, or an error that says how to write it."""
    kinds = set(typing.get_args(hint)) if isinstance(hint, types.UnionType) or typing.get_origin(hint) else {hint}
    plain = {typing.get_origin(kind) or kind for kind in kinds}
    if value is None:
        if type(None) not in plain:
            raise ValueError(f"{path}: {key} has no value; give one or leave the line out.")
        return None
    if isinstance(value, bool) and bool not in plain:
        raise ValueError(
            f"{path}: {key} is {value} here, because YAML reads yes, no, on, off, true and false as truth values; "
            f'for text write quotes, such as {key}: "no".'
        )
    if isinstance(value, dict) and dict not in plain:
        raise ValueError(f"{path}: {key} takes a single value, not a mapping.")
    if isinstance(value, list) and list not in plain and action.nargs is None:
        raise ValueError(f"{path}: {key} takes a single value, not a list.")
    if plain <= {bool, type(None)} and not isinstance(value, bool):
        raise ValueError(f"{path}: {key} is {value!r}; write true or false.")
    numbers = plain & {int, float}
    if numbers and not plain & {str, dict, list}:
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise ValueError(f"{path}: {key} is {value!r}; a number is expected.") from None
        if float not in plain and not number.is_integer():
            raise ValueError(f"{path}: {key} is {value!r}; a whole number is expected.")
        return number if float in plain else int(number)
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and not numbers else value
