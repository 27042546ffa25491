"""What of vLLM's side needs no vLLM: the server's command, its refusals, and the class's word to other engines."""

import importlib.metadata
import os
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import psutil
import pytest
from modeling.tiny import tiny_model

from aligngpt_hub.serving import vllm
from aligngpt_trainers.commands import cli
from aligngpt_trainers.commands.extras import check_extra


def test_other_engines_are_told_why_not():
    with pytest.raises(ValueError, match=r"its gate compares images with the prompt.*aligngpt export"):
        tiny_model().is_backend_compatible()


def test_vllm_finds_the_class():
    (point,) = [p for p in importlib.metadata.entry_points(group="vllm.general_plugins") if p.name == "aligngpt"]
    assert point.value == "aligngpt_hub.engines.vllm_plugin:register" and callable(point.load())


def test_addresses_are_fetched_only_when_asked_for():
    command = vllm.vllm_command("user/model", "v1", "it", "127.0.0.1", 8000, "auto", False, "--max-model-len 512")
    assert command[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    assert command[command.index("--allowed-media-domains") + 1].endswith(".invalid")
    assert command[-2:] == ["--max-model-len", "512"] and command[command.index("--revision") + 1] == "v1"
    assert command[command.index("--limit-mm-per-prompt") + 1] == '{"image": 8}'
    assert command[command.index("--served-model-name") + 1] == "it"
    assert "--allowed-local-media-path" not in command
    fetching = vllm.vllm_command("model", None, "it", "127.0.0.1", 8000, "auto", True)
    assert "--allowed-media-domains" not in fetching and "--revision" not in fetching


def test_a_missing_or_old_vllm_is_one_line(monkeypatch):
    if vllm.importlib.util.find_spec("vllm") is None:
        with pytest.raises(ImportError, match=r"needs vLLM: pip install"):
            vllm.check_vllm()
    monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))
    monkeypatch.setattr(vllm.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(vllm, "version", lambda name: "0.9.1")
    with pytest.raises(ImportError, match=r"needs vLLM 0.32 or later, 0.9.1 is installed"):
        vllm.check_vllm()
    monkeypatch.setattr(vllm, "version", lambda name: "0.33.0")
    assert vllm.check_vllm() == "0.33.0"


def test_vllm_needs_no_extra_of_ours(monkeypatch):
    """Beside vLLM stands the core alone: the packages of `serve` are not asked for."""
    monkeypatch.setitem(check_extra.__globals__["EXTRAS"], "serve", "deepspeed")
    with pytest.raises(ImportError):
        check_extra("serve", ["--model", "x"])
    check_extra("serve", ["--model", "x", "--backend", "vllm"])
    check_extra("serve", ["--model", "x", "--backend=vllm"])


def test_settings_of_the_other_backend_are_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "aligngpt"}')
    words = ["serve", "--model", str(tmp_path)]
    assert cli.main([*words, "--vllm-options=--x"]) == 2
    assert "no effect without --backend vllm" in capsys.readouterr().err
    assert cli.main([*words, "--backend", "vllm", "--device", "cpu"]) == 2
    assert "--device has no effect with --backend vllm" in capsys.readouterr().err


SERVER = """
import http.server, os, pathlib, sys
port = int(sys.argv[sys.argv.index("--port") + 1])
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
server = http.server.HTTPServer(("127.0.0.1", port), Healthy)
told = os.environ["VLLM_NO_USAGE_STATS"]
pathlib.Path(os.environ["STARTED"]).write_text(f"{os.getpid()}\\n{sys.argv} {told=}")
server.serve_forever()
"""
EVALUATION = """
import pathlib, sys, time
from aligngpt_hub.evaluation.server_model import vllm_server
with vllm_server(sys.executable, ["--model", sys.argv[1]], pathlib.Path(sys.argv[1]) / "vllm.log"):
    print("answers", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def in_place_of_vllm(tmp_path):
    """Environment and model folder; vLLM itself is stopped by `tests/engines/evaluate_check.py`."""
    package = tmp_path / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    (package / "api_server.py").write_text(SERVER)
    about = tmp_path / "vllm-0.32.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0\n")
    for folder in (tmp_path / "vllm", package.parent, package):
        (folder / "__init__.py").write_text("")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "aligngpt"}')
    return {**os.environ, "PYTHONPATH": str(tmp_path), "STARTED": str(tmp_path / "started")}, model


def wait_for(done) -> None:
    until = time.monotonic() + 60
    while not done():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_who_stops_the_command_stops_the_server(in_place_of_vllm):
    environment, model = in_place_of_vllm
    started = Path(environment["STARTED"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "aligngpt_trainers", "serve", "--backend", "vllm", "--model", str(model)]
    options = ["--port", port, "--vllm-options", "--api-key SECRET --x=SECRET"]
    process = subprocess.Popen([*command, *options], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: process.poll() is not None or (started.is_file() and started.read_text()))
        number, words = started.read_text().split("\n")
        assert int(number) == process.pid and "'--trust-request-mm-kwargs'" in words
        assert "'--served-model-name', 'model'" in words and "'--api-key', 'SECRET'" in words
        assert words.endswith("told='1'")
    finally:
        process.terminate()
    assert process.wait(30) != 0
    printed = process.stdout.read()
    assert "vLLM 0.32.0: " in printed and printed.endswith("--api-key --x\n") and "SECRET" not in printed


def test_who_stops_the_evaluation_stops_the_server(in_place_of_vllm):
    environment, model = in_place_of_vllm
    command = [sys.executable, "-c", EVALUATION, str(model)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "answers\n"
        server = int(Path(environment["STARTED"]).read_text().split("\n")[0])
        assert psutil.pid_exists(server)
    finally:
        process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM
    wait_for(lambda: not psutil.pid_exists(server))
