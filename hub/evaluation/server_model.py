"""
Benchmarks asked of a server: `aligngpt evaluate --server URL`, or `--backend vllm`, which starts vLLM's own.

The prompts are those of the benchmarks; the server's chat template, which comes with the model, makes the same tokens
of them as our processor does here.
"""

import base64
import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from openai import OpenAI, OpenAIError

from modeling_aligngpt.images_aligngpt import read_image

from .answers import AnsweringLmms, answer_row, generation_settings
from .store import hash_weights


SECONDS_TO_START, SECONDS_TO_ANSWER = 900, 600


class ServerLmms(AnsweringLmms):
    """
    Asks an OpenAI-compatible server (`aligngpt serve`, vLLM) that answers with an AlignGPT.

    Args:
        url: up to `/v1`.
        model: how the server names it; default: the only one it has.
        align_level: level that every answer is steered to (0-based).
        batch_size: requests at once.
        key_env: variable with the server's key.

    Raises:
        ValueError: no such server, or it serves several models and none was named.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        align_level: int | None = None,
        batch_size: int = 32,
        key_env: str = "OPENAI_API_KEY",
    ):
        super().__init__()
        self.accelerator = Accelerator(cpu=True)
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self._world_size > 1:
            raise ValueError("A server is asked by one process: leave --accelerate_config out, raise --batch-size.")
        self.batch_size, self.align_level = batch_size, align_level
        key = os.environ.get(key_env, "")
        self.engine, served = ask_server(url, key)
        names = list(served)
        if model is None:
            if len(names) != 1:
                raise ValueError(f"{url} serves {', '.join(names) or 'nothing'}: name one with --model.")
            model = names[0]
        # a folder is known to the server by the name that it was started with
        self.name = model if model in names else names[0] if len(names) == 1 else model
        self.context = served.get(self.name)
        self.client = OpenAI(base_url=url, api_key=key or "none", timeout=SECONDS_TO_ANSWER)
        local = Path(model).is_dir()
        self.identity = {
            "model": Path(model).resolve().name if local else model,
            "revision": None,
            "weights": hash_weights(model) if local else None,
            "server": self.engine,
            "align_level": align_level,
        }

    def answer_batch(self, requests: Sequence[Instance]) -> Iterator[dict[str, Any]]:
        with ThreadPoolExecutor(self.batch_size) as pool:
            # tasks open their data as they go: the prompts are made by this one thread, and waited for by many
            asked = [pool.submit(self._ask, request, *self.messages_of(request)) for request in requests]
            try:
                for done in as_completed(asked):
                    yield done.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _ask(self, request: Instance, messages: list[dict[str, Any]], images: list) -> dict[str, Any]:
        found = iter(map(data_url, images))
        sent = [
            {
                "role": message["role"],
                "content": [
                    part if part["type"] == "text" else {"type": "image_url", "image_url": {"url": next(found)}}
                    for part in message["content"]
                ],
            }
            for message in messages
        ]
        settings, stops = generation_settings(request.args[2])
        if settings.get("num_beams", 1) > 1:
            raise ValueError(f"{request.args[4]} asks for num_beams={settings['num_beams']}: no server has them.")
        tokens = settings["max_new_tokens"]
        if self.context is not None and tokens > self.context // 2:
            tokens = None  # vLLM refuses what might not fit behind the prompt; without a number it takes what is left
        level: dict[str, Any] = {}
        if self.align_level is not None:
            steer = {"align_level": self.align_level}
            level = {"mm_processor_kwargs": steer} if self.engine.startswith("vLLM") else steer
        try:
            answered = self.client.chat.completions.create(
                messages=sent,
                model=self.name,
                max_tokens=tokens,
                temperature=settings.get("temperature", 1.0) if settings["do_sample"] else 0.0,
                stop=stops[:4] or None,
                extra_body=level,
            )
            answer = answered.choices[0].message.content or ""
        except (OpenAIError, IndexError, TypeError, AttributeError) as error:
            sample = f"{request.args[4]}, sample {request.args[3]}"
            raise ValueError(f"{sample}: no answer of the server: {error}") from error
        text = "\n".join(part["text"] for message in messages for part in message["content"] if "text" in part)
        return answer_row(request, text, answer, stops, None)


def data_url(image: Any) -> str:
    """An image as a request holds it: without loss where PNG takes its mode, and as transparent as it is."""
    data = io.BytesIO()
    (image if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA") else read_image(image)).save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def ask_server(url: str, key: str = "") -> tuple[str, dict[str, int | None]]:
    """
    The server's name (`vLLM 0.32.0`, or `server`) and its models, each with its context length in tokens where the
    server gives one.

    Raises:
        ValueError: there is none, or it is no OpenAI-compatible one.
    """
    if not url.rstrip("/").endswith("/v1"):
        raise ValueError(f"--server {url}: give the address up to /v1.")
    root = url.rstrip("/").removesuffix("/v1")
    try:
        served = {entry["id"]: entry.get("max_model_len") for entry in _get(f"{root}/v1/models", key)["data"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--server {url}: no OpenAI-compatible server answers ({error}); start one: aligngpt serve --model MODEL."
        ) from error
    try:
        return f"vLLM {_get(f'{root}/version', key)['version']}", served
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "server", served


def _get(address: str, key: str = "", timeout: float = 30) -> Any:
    """JSON from a server whose address the user has given."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=timeout) as answer:
        return json.load(answer)


@contextlib.contextmanager
def vllm_server(python: str, words: Sequence[str], log: Path) -> Iterator[str]:
    """
    `aligngpt serve --backend vllm` while the block runs; gives its address up to `/v1`.

    Args:
        python: the interpreter of an environment with vLLM and this package.
        words: further options.
        log: file that gets what it prints.

    Raises:
        ValueError: it ended before it answered; with its last line.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "aligngpt_trainers", "serve", "--backend", "vllm", "--port", str(port), *words]
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"starting vLLM ({log} has its messages)", file=sys.stderr, flush=True)
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    try:
        with _exit_when_terminated():
            _wait_for(process, port, log)
            yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


@contextlib.contextmanager
def _exit_when_terminated() -> Iterator[None]:
    """SIGTERM ends this process as an exception does, so that what it has started is stopped as well."""
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers are the main thread's
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def root_cause(text: str) -> str:
    """The error in vLLM's output that caused the others, without the names of its processes."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    lines = [re.sub(r"^\(.*?\) (ERROR .*?\] )?", "", line) for line in lines]
    found = [i for i, line in enumerate(lines) if re.search(r"\w*(Error|error): ", line) and "cause above" not in line]
    if not found:
        return lines[-1] if lines else "it said nothing"
    # pydantic says what is wrong in the lines behind
    behind = 3 if "validation error" in lines[found[-1]] else 1
    return " ".join(lines[found[-1] : found[-1] + behind])[:500]


def _wait_for(process: subprocess.Popen, port: int, log: Path) -> None:
    until = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < until:
        if process.poll() is not None:
            text = log.read_text(encoding="utf-8", errors="replace")
            raise ValueError(f"vLLM ended before it answered: {root_cause(text)} (see {log}).")
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return
        time.sleep(1)
    raise ValueError(f"vLLM has not answered within {SECONDS_TO_START} s; see {log}.")
