import argparse
import contextlib
import io
import json
import os
import shutil

import pytest

from aligngpt_playground import quickstart
from aligngpt_playground.__main__ import main


def arguments(*words):
    parser = argparse.ArgumentParser()
    quickstart.add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


EARLIER = json.dumps({"kind": quickstart.KIND})
TINY = ("--pairs", 64, "--conversations", 32, "--heldout", 6, "--max-steps", 2)


# ---- a miniature run, end to end ----


@pytest.fixture(scope="module")
def run(random_parts, tmp_path_factory):
    """Exit status, output folder and what was printed by a run on parts with random weights, two steps a stage."""
    output = tmp_path_factory.mktemp("runs") / "quickstart"
    output.mkdir()
    (output / "results.json").write_text(EARLIER)
    (output / "stale").write_text("of an earlier run")
    before = os.getcwd()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = quickstart.run(arguments("--output", output, "--parts", random_parts, *TINY))
    assert os.getcwd() == before
    return status, output, printed.getvalue()


def test_the_run_succeeds_and_leaves_everything(run):
    status, output, printed = run
    assert status == 0, printed
    files = (
        "report.html",
        "results.json",
        "pretrain/config.json",
        "instruct/model.safetensors",
        "scored/alignment.json",
    )
    for name in files:
        assert (output / name).is_file(), name
    for name in ("data/pairs", "data/conversations", "parts/clip", "parts/llama", "recipes"):
        assert (output / name).is_dir(), name


def test_an_earlier_output_is_replaced_and_nothing_is_left_beside_it(run):
    _, output, _ = run
    assert not (output / "stale").exists()
    assert list(output.parent.iterdir()) == [output]


def test_every_step_prints_its_command_and_time(run):
    _, output, printed = run
    results = json.loads((output / "results.json").read_text())
    commands = [step["command"] for step in results["steps"] if step["command"]]
    assert commands[1:] == [
        "aligngpt score --config recipes/score.yaml",
        "aligngpt pretrain --config recipes/pretrain.yaml --max_steps 2",
        "aligngpt instruct --config recipes/instruct.yaml --max_steps 2",
    ]
    assert commands[0].startswith("python -m aligngpt_playground make --output data --pairs 64")
    assert all(f"$ {command}" in printed for command in commands)
    assert len(results["steps"]) == quickstart.NUM_STEPS
    assert sum(step["seconds"] for step in results["steps"]) <= results["seconds"] + 0.1


def test_the_stages_are_those_of_the_method(run):
    _, output, _ = run
    pretrain, instruct = (json.loads((output / name / "config.json").read_text()) for name in ("pretrain", "instruct"))
    assert (pretrain["training_stage"], pretrain["align_mode"]) == ("pretrain", "level")
    assert (instruct["training_stage"], instruct["align_mode"]) == ("instruct", "gate")
    results = json.loads((output / "results.json").read_text())
    counts = results["levels"]["counts"]
    assert len(counts) == 8 and sum(counts) == sum(results["levels"]["histogram"]["counts"]) == 64


def test_the_saved_folder_answers_the_same_without_our_packages(run):
    _, output, _ = run
    results = json.loads((output / "results.json").read_text())
    examples, again = results["questions"]["examples"], results["loaded_back"]["answers"]
    assert len(again) == 3
    assert [entry["answer"] for entry in again] == [example["answer"] for example in examples[:3]]


def test_missed_targets_and_chance_are_said_and_do_not_fail(run):
    _, output, printed = run
    assert "target 0.65 MISSED" in printed and "at chance" in printed
    html = (output / "report.html").read_text(encoding="utf-8")
    assert "target 0.65: missed" in html and "at chance</span>" in html


def test_nothing_in_the_output_names_a_folder_that_is_gone(run):
    _, output, _ = run
    for path in output.rglob("*"):
        if path.suffix in (".json", ".yaml", ".html", ".jinja"):
            assert str(output.parent) not in path.read_text(encoding="utf-8"), path


# ---- what goes wrong is said ----


def test_numbers_are_checked(tmp_path, capsys):
    assert main(["quickstart", "--output", str(tmp_path / "run"), "--pairs", "0"]) == 1
    assert capsys.readouterr().err == "error: --pairs is 0; it must be at least 1\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["thesis.tex", "results.json"])
@pytest.mark.parametrize("content", ["precious", "[1]", '{"kind": "of another program"}'])
def test_a_folder_of_something_else_is_not_touched(name, content, tmp_path, capsys):
    (tmp_path / name).write_text(content)
    assert quickstart.run(arguments("--output", tmp_path)) == 1
    assert "holds something other than an earlier quickstart" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == content


def test_a_file_in_the_way_and_an_impossible_folder_are_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert quickstart.run(arguments("--output", tmp_path / "file")) == 1
    assert "is a file" in capsys.readouterr().err
    assert quickstart.run(arguments("--output", tmp_path / "file" / "run")) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_missing_parts_are_named_and_the_earlier_output_stays(tmp_path, capsys):
    output = tmp_path / "run"
    output.mkdir()
    (output / "results.json").write_text(EARLIER)
    assert quickstart.run(arguments("--output", output, "--parts", tmp_path)) == 1
    assert "step 1 of 9" in (error := capsys.readouterr().err) and "clip holds no model" in error
    assert [path.name for path in tmp_path.iterdir()] == ["run"] and (output / "results.json").read_text() == EARLIER


def test_a_command_that_fails_ends_the_run_with_its_name(random_parts, tmp_path, capsys):
    shutil.copytree(random_parts, tmp_path / "parts")
    (tmp_path / "parts" / "llama" / "model.safetensors").unlink()
    assert quickstart.run(arguments("--output", tmp_path / "run", "--parts", tmp_path / "parts", *TINY)) == 1
    error = capsys.readouterr().err
    assert "error: step 4 of 9 (Stage 1: pre-training) failed: `aligngpt pretrain` ended with status 2" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts"]


def test_an_error_while_finishing_keeps_the_earlier_output(tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    (output / "results.json").write_text(EARLIER)
    with pytest.raises(RuntimeError, match="in the middle"), quickstart._output_folder(output) as folder:
        (folder / "results.json").write_text("half")
        raise RuntimeError("in the middle")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert (output / "results.json").read_text() == EARLIER


def test_leftovers_of_killed_runs_are_removed_and_running_ones_kept(tmp_path):
    for process in ("999999999", str(os.getppid())):
        (tmp_path / f".run.{process}.partial").mkdir()
    with quickstart._output_folder(tmp_path / "run") as folder:
        (folder / "results.json").write_text("{}")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([f".run.{os.getppid()}.partial", "run"])
