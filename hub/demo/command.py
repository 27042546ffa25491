"""`aligngpt demo`: the Space's app on this machine."""

import argparse
import importlib.util
import runpy
import sys

from ..local import QUICKSTART, check_port, find_local_model, port
from .space import TEMPLATE


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("--model", help=f"an AlignGPT: folder or Hub id (default: {QUICKSTART}, else `playground`)")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=port, help="port (default: the first free one from 7860)")


def run(args: argparse.Namespace):
    """`aligngpt demo`; serves until it is stopped."""
    model = find_local_model(args.model, args.revision)
    if importlib.util.find_spec("gradio") is None:
        raise ImportError("The demo needs gradio: pip install '.[demo]' in a checkout.")
    if args.port is not None:
        check_port(args.host, args.port)
    sys.path.insert(0, str(TEMPLATE))
    runpy.run_path(str(TEMPLATE / "app.py"))["main"](model, args.revision, args.host, args.port)
