"""Processes that meet the local Hub as users' do: with transformers alone, or with the `aligngpt` command."""

import json
import subprocess
import sys
from pathlib import Path

import zygote
from local_hub.server import HubServer


# the client waits up to 23 s in all before it gives up on a broken connection: not here
IMPATIENT = "import time; time.sleep = lambda seconds: None\n"

# makes a process one where AlignGPT was never installed
NOT_INSTALLED = """
import importlib.abc, sys
class NotInstalled(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] == "modeling_aligngpt" or fullname.startswith("aligngpt_"):
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
sys.meta_path.insert(0, NotInstalled())
"""

COMMAND = IMPATIENT + "import sys; from aligngpt_trainers.commands.cli import main; sys.exit(main(sys.argv[1:]))"


def run_python(hub: HubServer, code: str, words=(), token=None, home=None, path=None, cwd=None, **environment):
    """A Python process, elsewhere, without a terminal; `path` goes in front of its import path."""
    environment = hub.env(token=token, home=home, **environment)
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    folder = Path(cwd or environment["HF_HOME"]) / "elsewhere"
    folder.mkdir(parents=True, exist_ok=True)
    if path is None:
        return zygote.run(code, [*map(str, words)], environment, folder, timeout=300)
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


def run_command(hub: HubServer, *words, token=None, **environment):
    """`aligngpt ...`; `token` is the server's own by default, "" for none."""
    token = hub.token if token is None else token or None
    return run_python(hub, COMMAND, words, token=token, **environment)


def run_script(hub: HubServer, code: str, words=(), **more) -> dict:
    """What a script without AlignGPT prints as JSON in its last line."""
    result = run_python(hub, IMPATIENT + NOT_INSTALLED + code, words, **more)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])
