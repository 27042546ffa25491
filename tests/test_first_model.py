"""`docs/first-model.md` leads from nothing to a model that may be published: its commands, in order, on fewer rows."""

import shlex

import documents
import pytest
from documents import ROOT

from aligngpt_playground.__main__ import main as playground
from aligngpt_playground.world import parts_path
from aligngpt_trainers.commands.cli import main


# behind the page's own: the last one counts
SMALLER = {"make": ["--pairs", "64", "--conversations", "48", "--heldout-pairs", "8", "--heldout-conversations", "8"]}
SMALLER |= {name: ["--max_steps", "2"] for name in ("pretrain", "instruct")}


@pytest.mark.proof
def test_from_nothing_to_a_published_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ran = []
    for line in documents.commands((ROOT / "docs" / "first-model.md").read_text()):
        line = line.replace("PARTS", str(parts_path("clip").parent))
        words = shlex.split(line, comments=True)
        if words[:3] == ["python", "-m", "aligngpt_playground"]:
            assert playground([*words[3:], *SMALLER.get(words[3], [])]) == 0, line
        elif words[0] == "aligngpt" and (words[1] not in ("publish", "space") or "--dry-run" in words):
            status = main([*words[1:], *SMALLER.get(words[1], [])])
            assert status == 0, f"{line}\n{capsys.readouterr().err[-2000:]}"
        else:
            continue
        ran.append(words[1] if words[0] == "aligngpt" else words[3])
    expected = "make parts score init check pretrain instruct chat levels publish"
    assert ran == expected.split()
    assert "dry run: nothing was sent" in capsys.readouterr().out
