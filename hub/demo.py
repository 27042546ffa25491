"""`aligngpt demo`: the Space's app on this machine."""

import argparse
import importlib.util
import json
import os
import runpy
import socket
import sys
from pathlib import Path

from .serve import port
from .space_command import TEMPLATE


QUICKSTART = Path("runs/quickstart/instruct")


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("--model", help=f"an AlignGPT: folder or Hub id (default: the quickstart's, {QUICKSTART})")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=port, help="port (default: the first free one from 7860)")


def run(args: argparse.Namespace):
    """`aligngpt demo`; serves until it is stopped."""
    model = find_demo_model(args.model, args.revision)
    if importlib.util.find_spec("gradio") is None:
        raise ImportError("The demo needs gradio: pip install 'aligngpt[demo]'.")
    if args.port is not None:
        check_port(args.host, args.port)
    sys.path.insert(0, str(TEMPLATE))
    runpy.run_path(str(TEMPLATE / "app.py"))["main"](model, args.revision, args.host, args.port)


def find_demo_model(model: str | None, revision: str | None = None) -> str:
    """
    The model to show.

    Raises:
        ValueError: there is none where it should be, it is not an AlignGPT, or a folder is asked for a revision.
    """
    if model is None:
        if revision is not None:
            raise ValueError("--revision belongs to a Hub id: name one with --model.")
        if not (QUICKSTART / "config.json").is_file():
            raise ValueError(
                f"There is no model in {QUICKSTART} (from here): run `make quickstart`, or name one with --model."
            )
        return str(QUICKSTART)
    folder = Path(model)
    if not folder.exists():
        if model.count("/") != 1 or model.startswith((".", "/", "~")):
            raise ValueError(f"--model {model}: there is no such folder, and it is not a Hub id (USER/NAME).")
        return model
    if not (folder / "config.json").is_file():
        raise ValueError(f"--model {model}: there is no config.json in it, so it is not a model's folder.")
    if revision is not None:
        raise ValueError("--revision belongs to a Hub id; a folder has none.")
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind != "aligngpt":
        raise ValueError(f"--model {model}: its model_type is {kind!r}, not 'aligngpt'.")
    return model


def check_port(host: str, port: int):
    """ValueError when another program listens there already, or nobody may."""
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        reason = os.strerror(error.errno)
        raise ValueError(f"{host}:{port} cannot be used ({reason}): choose another --port.") from error
