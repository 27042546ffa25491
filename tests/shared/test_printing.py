"""Text from outside doesn't command the terminal, and nothing is reported to anybody."""

import os
import subprocess
import sys

import pytest

from aligngpt_shared.printing import printable
from aligngpt_trainers.commands.cli import main


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\r\nc\n", "a\tb\nc\n"),
        ("\x1b[2J\x1b]0;owned\x07", "\\x1b[2J\\x1b]0;owned\\x07"),
        ("a\rb\x08\x9b31m", "a\\rb\\x08\\x9b31m"),
        ("abc\u202etxt.exe", "abc\\u202etxt.exe"),
        ("naïve 猫 👩\u200d🚀", "naïve 猫 👩\u200d🚀"),
    ],
)
def test_control_characters_are_written_out(text, shown):
    assert printable(text) == shown


def test_an_error_with_a_hostile_name_is_harmless(tmp_path, capsys):
    assert main(["chat", "--model", str(tmp_path / "\x1b[2Jmodel")]) == 2
    error = capsys.readouterr().err
    assert "\x1b" not in error and "\\x1b[2Jmodel" in error


@pytest.mark.parametrize(("given", "off"), [(None, "True"), ("0", "False")])
def test_telemetry_is_off_unless_it_is_asked_for(given, off):
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_TELEMETRY"}
    if given is not None:
        environment["HF_HUB_DISABLE_TELEMETRY"] = given
    code = (
        "from aligngpt_trainers.commands.cli import main; main(['recipes'])\n"
        "from huggingface_hub import constants; print(constants.HF_HUB_DISABLE_TELEMETRY)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == off
