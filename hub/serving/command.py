"""
`aligngpt serve`: transformers' own OpenAI-compatible server, told how to load and ask an AlignGPT.

Over `transformers serve` this adds: the model's classes (no code from the Hub is run), `align_level` in requests, one
pinned model, an allow-list of routes and of what a request may hold (`requests.py`), and no reading of files or
addresses that a request names.
"""

import argparse
import importlib.util
import os
import socket

from ..local import find_local_model, port


DEFAULT_PORT = 8000
# Of transformers' server, these are served; all others answer 404.
ROUTES = ("/v1/chat/completions", "/v1/responses", "/v1/models", "/health")


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("--model", required=True, help="an AlignGPT: folder or Hub id; requests name it so")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
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
    if args.backend == "vllm":
        from .vllm import run_vllm

        if args.device != "auto":
            raise ValueError("--device has no effect with --backend vllm, which takes the device it was built for.")
        return run_vllm(args)
    if args.vllm_options:
        raise ValueError("--vllm-options has no effect without --backend vllm.")
    if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None:
        raise ImportError("Serving needs fastapi and uvicorn: pip install 'aligngpt[demo]'.")
    import uvicorn

    # held from here on: a port in use shows before the model is loaded
    try:
        listener = socket.create_server((args.host, args.port))
    except OSError as error:
        reason = os.strerror(error.errno)
        raise ValueError(f"{args.host}:{args.port} cannot be used ({reason}): choose another --port.") from error
    with listener:
        app = build_app(args.model, args.revision, args.device, args.dtype, args.fetch_urls)
        print(f"http://{args.host}:{listener.getsockname()[1]}/v1 serves {args.model}", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


def build_app(
    model: str, revision: str | None = None, device: str = "auto", dtype: str = "auto", fetch_urls: bool = False
):
    """
    The server's FastAPI application with the model loaded.

    Args:
        model: folder or Hub id.
        revision: of a Hub id.
        device, dtype: as `transformers serve` takes them.
        fetch_urls: whether images may be web addresses; data URLs always may, files never.
    """
    # they import the server's parts, which a machine without the extra does not have
    from fastapi import HTTPException
    from fastapi.exceptions import RequestValidationError
    from transformers.cli.serving.server import build_server
    from transformers.utils import logging

    from .parts import AlignGPTModelManager, ChatHandler, LevelGenerationState, ResponsesHandler
    from .requests import MAX_BODY_BYTES

    logging.set_verbosity_error()
    manager = AlignGPTModelManager(model, revision, device=device, dtype=dtype)
    state = LevelGenerationState()
    app = build_server(
        manager,
        ChatHandler(manager, state, fetch_urls=fetch_urls),
        completion_handler=None,
        response_handler=ResponsesHandler(manager, state, fetch_urls=fetch_urls),
        transcription_handler=None,
        systemone_handler=None,
        generation_state=state,
    )
    # what was not made safe here is not there
    app.router.routes = [route for route in app.router.routes if route.path in ROUTES]

    @app.middleware("http")
    async def refuse_large_bodies(request, call_next):
        length = request.headers.get("content-length", "0")
        if request.method == "POST" and (not length.isdigit() or int(length) > MAX_BODY_BYTES):
            return _error(f"The request is larger than {MAX_BODY_BYTES // 2**20} MB.", 413)
        if request.method == "POST" and "content-length" not in request.headers:
            return _error("The request does not say its length (Content-Length).", 411)
        return await call_next(request)

    # as OpenAI's clients read errors: with the message in them
    @app.exception_handler(HTTPException)
    async def refuse(_request, error: HTTPException):
        return _error(error.detail, error.status_code)

    @app.exception_handler(ValueError)
    async def say_what_was_wrong(_request, error: ValueError):
        return _error(str(error), 400)

    @app.exception_handler(RequestValidationError)
    async def say_what_is_no_json(_request, error: RequestValidationError):
        return _error(f"The request is no JSON object: {error.errors()[0]['msg']}.", 400)

    @app.exception_handler(Exception)
    async def say_that_it_broke(_request, error: Exception):
        return _error(f"The server failed at this request ({type(error).__name__}); it goes on.", 500)

    return app


def _error(message: str, status: int):
    from fastapi.responses import JSONResponse

    return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status_code=status)
