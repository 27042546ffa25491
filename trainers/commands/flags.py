"""Spellings of options."""

import argparse
from collections.abc import Sequence


# The commands that share their work between processes (`--accelerate_config`).
LAUNCHABLE = ("score", "pretrain", "instruct", "evaluate")


def with_known_flags(words: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """The words with flags as `parser` spells them: hyphens and underscores are the same in the name of an option."""
    spelled = {flag.replace("_", "-"): flag for flag in parser._option_string_actions}
    given = []
    for word in words:
        flag, equals, value = word.partition("=")
        if flag.startswith("--") and flag not in parser._option_string_actions:
            flag = spelled.get(flag.replace("_", "-"), flag)
        given.append(f"{flag}{equals}{value}")
    return given
