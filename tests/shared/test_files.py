"""Files and folders appear whole or not at all; two writers do not meet; records of a later version are refused."""

import json
import multiprocessing
import os
import signal
import time

import pytest

from aligngpt_shared import files
from aligngpt_shared.files import move_folder, new_folder, write_file, write_json
from aligngpt_shared.locks import lock, lock_of
from aligngpt_shared.records import known, read_record, versioned
from aligngpt_shared.references import is_hub_id


def test_a_file_is_replaced_in_one_step(tmp_path, monkeypatch):
    path = write_json(tmp_path / "deep" / "a.json", {"a": "ä"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "ä"} and path.read_text().endswith("\n")

    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_file(path, b"other")
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "ä"} and os.listdir(path.parent) == ["a.json"]


def test_a_folder_appears_when_it_is_whole(tmp_path):
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("a")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("a")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "a"]
    with pytest.raises(ValueError, match="exists: choose another folder"), new_folder(tmp_path / "out"):
        pass
    with new_folder(tmp_path / "out", replace=True) as folder:
        (folder / "b").write_text("b")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b"] and len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_was_there_stays_until_then(tmp_path):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    move_folder(tmp_path / "new", tmp_path / "old")
    assert [path.name for path in tmp_path.rglob("*")] == ["old", "new"]


def _hold(path, ready):
    with new_folder(path):
        ready.touch()
        time.sleep(60)


def test_two_writers_do_not_meet(tmp_path):
    """The second is refused; what a killed one has left is no lock and no output."""
    ready = tmp_path / "ready"
    process = multiprocessing.get_context("fork").Process(target=_hold, args=(tmp_path / "out", ready))
    process.start()
    while not ready.exists():
        time.sleep(0.01)
    with (
        pytest.raises(ValueError, match=f"out is being written by process {process.pid}"),
        new_folder(tmp_path / "out"),
    ):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (tmp_path / "out").exists()
    with new_folder(tmp_path / "out") as folder:
        (folder / "a").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "ready"]


def test_records_know_their_version(tmp_path):
    path = write_json(tmp_path / "alignment.json", versioned({"edges": [0, 1]}))
    assert read_record(path)["edges"] == [0, 1]
    assert known({"edges": []}, "of before") == {"edges": []}
    write_json(path, {"schema_version": 2})
    with pytest.raises(ValueError, match=r"alignment\.json is of schema version 2, this code knows up to 1"):
        read_record(path)
    for content in ("[]", "{", ""):
        write_file(path, content)
        with pytest.raises(ValueError, match="alignment"):
            read_record(path)


@pytest.mark.parametrize("name", ["user/name", "Org.1/a-b_c"])
def test_hub_ids(name):
    assert is_hub_id(name)


@pytest.mark.parametrize("name", [None, "", "name", "/user/name", "./name", "~/name", "a/b/c", "user/", "../name"])
def test_paths(name):
    assert not is_hub_id(name)


def test_a_link_to_a_folder_has_the_folders_lock(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with (
        lock(lock_of(tmp_path / "run")),
        pytest.raises(ValueError, match="being written"),
        lock(lock_of(tmp_path / "link")),
    ):
        pass
