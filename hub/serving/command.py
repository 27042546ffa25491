"""`aligngpt serve`: an OpenAI-compatible server of our own for one model, or vLLM's."""

import argparse
import importlib.util
import os
import socket
from pathlib import Path

from aligngpt_shared.printing import printable

from ..local import find_local_model, port


DEFAULT_PORT = 8000
# a connection on which no request begins is closed after this time, or up to twice of it
IDLE_SECONDS = 10


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("--model", required=True, help="an AlignGPT: folder or Hub id")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument(
        "--served-model-name", metavar="NAME", help="what requests call it (default: the folder's name, or the Hub id)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=port, default=DEFAULT_PORT, help=f"port (default: {DEFAULT_PORT}; 0: any)")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda:0, ...")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--fetch-urls", action="store_true", help="also load images from web addresses")
    parser.add_argument(
        "--backend",
        choices=("transformers", "vllm"),
        default="transformers",
        help="who answers: one request at a time by transformers (default), or many at once by vLLM",
    )
    parser.add_argument("--vllm-options", default="", metavar='"--x y"', help="further options of vLLM's own server")


def run(args: argparse.Namespace):
    """`aligngpt serve`; serves until it is stopped."""
    find_local_model(args.model, args.revision)
    # a path would tell every client about this machine
    if args.served_model_name is None:
        args.served_model_name = Path(args.model).resolve().name if Path(args.model).exists() else args.model
    if args.backend == "vllm":
        from .vllm import run_vllm

        if args.device != "auto":
            raise ValueError("--device has no effect with --backend vllm, which takes the device it was built for.")
        return run_vllm(args)
    if args.vllm_options:
        raise ValueError("--vllm-options has no effect without --backend vllm.")
    if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None:
        raise ImportError("Serving needs fastapi and uvicorn: pip install '.[serve]' in a checkout.")
    # held from here on: a port in use shows before the model is loaded
    try:
        listener = socket.create_server((args.host, args.port))
    except OSError as error:
        reason = os.strerror(error.errno)
        raise ValueError(f"{args.host}:{args.port} cannot be used ({reason}): choose another --port.") from error
    with listener:
        _serve(args, listener)


def _serve(args: argparse.Namespace, listener: socket.socket) -> None:
    import uvicorn
    from transformers.utils import logging
    from uvicorn.protocols.http.h11_impl import H11Protocol

    from .app import build_app

    class Impatient(H11Protocol):
        """Closes connections on which no request begins, which uvicorn keeps."""

        def connection_made(self, transport):
            super().connection_made(transport)
            self.loop.call_later(IDLE_SECONDS, self.close_if_idle, None)

        def close_if_idle(self, before):
            if self.cycle is before and (before is None or before.response_complete):
                self.transport.close()
            elif not self.transport.is_closing():
                self.loop.call_later(IDLE_SECONDS, self.close_if_idle, self.cycle)

    logging.set_verbosity_error()
    name = args.served_model_name
    app = build_app(args.model, args.revision, name, args.device, args.dtype, args.fetch_urls)
    print(printable(f"http://{args.host}:{listener.getsockname()[1]}/v1 serves {name}"), flush=True)
    config = uvicorn.Config(app, http=Impatient, ws="none", log_level="warning", timeout_graceful_shutdown=5)
    uvicorn.Server(config).run(sockets=[listener])
