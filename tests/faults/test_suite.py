"""One round of `suite.py`: kills, full disks, damage and two runs at once, at moments drawn anew each time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


# run by `make proofs`
pytestmark = pytest.mark.proof


SCRIPT = Path(__file__).with_name("suite.py")


def test_nothing_is_lost(tmp_path):
    command = [sys.executable, str(SCRIPT), "--rounds=1", "--short", f"--json={tmp_path / 'counts.json'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    found = json.loads((tmp_path / "counts.json").read_text())
    assert found["lost"] == []
    kinds = {kind.partition(":")[0] for kind in found["counts"]}
    assert kinds >= {"kill", "damage", "two at once"}
    assert sum(counter["trials"] for counter in found["counts"].values()) >= 10
