"""`aligngpt demo`: which model it shows, and that it starts."""

import json
import socket
from pathlib import Path

import pytest
from demo_model import save_demo_model, serving
from gradio_client import Client, handle_file

from aligngpt_hub.demo.space import TEMPLATE
from aligngpt_hub.local import QUICKSTART, find_local_model
from aligngpt_trainers.commands.cli import main, with_named_model


@pytest.fixture
def somewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_model(folder: Path, kind: str = "aligngpt") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    return folder


def test_without_a_model_it_is_the_quickstarts_else_the_playgrounds(somewhere, monkeypatch):
    monkeypatch.setattr("aligngpt_playground.trained.gate_model", lambda: "trained")
    assert with_named_model("demo", ["--port", "1"]) == ["--port", "1", "--model", "trained"]
    assert with_named_model("demo", ["--model", "playground"]) == ["--model", "trained"]
    assert with_named_model("demo", ["--model=playground"]) == ["--model=trained"]
    assert with_named_model("demo", ["--model", "USER/NAME"]) == ["--model", "USER/NAME"]
    assert with_named_model("publish", ["x"]) == ["x"]
    with pytest.raises(ValueError, match="make quickstart"):
        find_local_model(None)
    make_model(somewhere / QUICKSTART)
    assert find_local_model(None) == str(QUICKSTART)
    assert with_named_model("chat", []) == ["--model", str(QUICKSTART)]


def test_a_folder_or_a_hub_id(somewhere):
    assert find_local_model(str(make_model(somewhere / "run"))) == str(somewhere / "run")
    assert find_local_model("user/demo", "v1") == "user/demo"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "nowhere"], "no such folder"),
        (["--model", "/a/b"], "no such folder"),
        (["--model", "empty"], "no config.json"),
        (["--model", "other"], "config of a llava model"),
        (["--model", "run", "--revision", "v1"], "a folder has none"),
        (["--revision", "v1"], "name one with --model"),
    ],
)
def test_bad_words_are_one_line(somewhere, capsys, words, message):
    make_model(somewhere / "run")
    make_model(somewhere / "other", "llava")
    (somewhere / "empty").mkdir()
    assert main(["demo", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1


def test_a_port_in_use(somewhere, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["demo", "--model", str(make_model(somewhere / "run")), "--port", str(port)]) == 2
    assert f"127.0.0.1:{port} cannot be used (Address already in use)" in capsys.readouterr().err


def test_it_starts_from_any_folder_and_answers(somewhere):
    folder = save_demo_model(somewhere / QUICKSTART)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    variables = {"GRADIO_TEMP_DIR": str(somewhere / "uploads"), "HF_MODULES_CACHE": str(somewhere / "modules")}
    command = ["-m", "aligngpt_trainers", "demo", "--port", str(port)]
    with serving(command, r"unning on local URL:\s+(http://\S+)", somewhere, **variables) as match:
        assert match.group(1).rstrip("/") == f"http://127.0.0.1:{port}"
        client = Client(match.group(1), verbose=False)
        image = handle_file(str(TEMPLATE / "examples" / "teddy-and-car.png"))
        assert "pizza" in client.predict(image, "what is in the picture?", 3, api_name="/ask")[0]
    assert folder.is_dir()
