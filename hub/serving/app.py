"""The application of `aligngpt serve`: who may ask, whose turn it is, and answers as OpenAI's clients read them."""

import asyncio
import contextlib
import json
import logging
import multiprocessing
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, HTTPException
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from . import reading
from .answering import Answer, Answerer
from .requests import MAX_BODY_BYTES


logger = logging.getLogger("uvicorn.error")

# requests that are read, wait or are answered at once; the next one is told to come again
MAX_WAITING, RETRY_AFTER = 32, "5"
# of all bodies that are here at once, and the time that one may take to arrive
MAX_BYTES_HELD, BODY_SECONDS = 4 * MAX_BODY_BYTES, 30


@dataclass
class _Visit:
    """A request from its first byte to the last of its answer."""

    gone: threading.Event = field(default_factory=threading.Event)
    bytes_held: int = 0
    is_waiting: bool = False
    tasks: list[asyncio.Future] = field(default_factory=list)


class ChatCompletions:
    """
    `/v1/chat/completions`, as an ASGI application. One request is read at a time, in a process, and one answered, in a
    thread; all others wait in line, and leave it when their client does.

    Args:
        source, revision: folder or Hub id.
        name: by which requests call the model.
        device, dtype: see [`Answerer`].
        fetch_urls: see [`Reader`].
    """

    def __init__(self, source: str, revision: str | None, name: str, device: str, dtype: str, fetch_urls: bool):
        self.name, self._reading = name, (source, revision, name, fetch_urls)
        self.reader, self.thread = self._new_reader(), ThreadPoolExecutor(1)
        ready = self.reader.submit(reading.is_ready)  # starts while the model is loaded
        self.answerer = Answerer(source, revision, device, dtype)
        ready.result()
        self.read_lock, self.answer_lock = asyncio.Lock(), asyncio.Lock()
        self.bytes_held = self.waiting = 0

    def _new_reader(self) -> ProcessPoolExecutor:
        # not forked: this process has threads
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(1, mp_context=context, initializer=reading.start, initargs=self._reading)

    async def __call__(self, scope, receive, send) -> None:
        visit = _Visit()
        try:
            self._check_place()
            body = await self._take_body(Request(scope, receive), visit)
            self._check_place()
            self.waiting, visit.is_waiting = self.waiting + 1, True
            work = asyncio.ensure_future(self._respond(body, visit))
            visit.tasks += [work, asyncio.ensure_future(self._watch(receive, visit, work))]
            await asyncio.wait([work])
            if not work.cancelled():
                if not isinstance(error := work.exception(), (HTTPException, type(None))):
                    logger.error("A request failed.", exc_info=error)
                    raise HTTPException(500, _failure(error))
                await work.result()(scope, receive, send)
        except ClientDisconnect:
            pass
        finally:
            visit.gone.set()
            for task in visit.tasks:
                task.cancel()
            self.bytes_held -= visit.bytes_held
            self.waiting -= visit.is_waiting

    def _check_place(self) -> None:
        if self.waiting >= MAX_WAITING:
            raise _busy(f"{MAX_WAITING} requests are waiting already")

    async def _take_body(self, request: Request, visit: _Visit) -> bytearray:
        too_large = HTTPException(413, f"The request is larger than {MAX_BODY_BYTES // 2**20} MB.")
        length = request.headers.get("content-length", "0")
        if not length.isdigit() or int(length) > MAX_BODY_BYTES:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    body += chunk
                    visit.bytes_held += len(chunk)
                    self.bytes_held += len(chunk)
                    if len(body) > MAX_BODY_BYTES:
                        raise too_large
                    if self.bytes_held > MAX_BYTES_HELD:
                        raise _busy("too many large requests are on their way")
        except TimeoutError:
            raise HTTPException(408, f"The request did not arrive within {BODY_SECONDS} s.") from None
        return body

    @staticmethod
    async def _watch(receive, visit: _Visit, work: asyncio.Future) -> None:
        """Ends the work for a client that leaves."""
        while (await receive())["type"] != "http.disconnect":
            pass
        visit.gone.set()
        work.cancel()

    async def _respond(self, body: bytearray, visit: _Visit) -> Response:
        loop = asyncio.get_running_loop()
        try:
            prompt = await _alone(self.read_lock, lambda: loop.run_in_executor(self.reader, reading.read, body))
        except BrokenExecutor:  # killed, for want of memory as a rule
            self.reader = self._new_reader()
            raise
        body.clear()
        self.bytes_held, visit.bytes_held = self.bytes_held - visit.bytes_held, 0
        pieces: asyncio.Queue[str | None] = asyncio.Queue()
        send = (lambda piece: loop.call_soon_threadsafe(pieces.put_nowait, piece)) if prompt.stream else None
        answering = asyncio.ensure_future(
            _alone(
                self.answer_lock,
                lambda: loop.run_in_executor(self.thread, self.answerer.answer, prompt, visit.gone, send),
            )
        )
        visit.tasks.append(answering)
        if not prompt.stream:
            return JSONResponse(self._completion(await answering))
        answering.add_done_callback(lambda _: pieces.put_nowait(None))
        # what goes wrong before the first word is told as an error
        first = await pieces.get()
        if first is None:
            await answering
        return StreamingResponse(
            self._events(first, pieces, answering, prompt.with_usage), media_type="text/event-stream"
        )

    def _head(self, kind: str) -> dict[str, Any]:
        made = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time())}
        return {**made, "model": self.name}

    def _completion(self, answer: Answer) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.reason}
        return {**self._head("chat.completion"), "choices": [choice], "usage": _usage(answer)}

    async def _events(
        self, piece: str | None, pieces: asyncio.Queue, answering: asyncio.Future, with_usage: bool
    ) -> AsyncIterator[str]:
        head = self._head("chat.completion.chunk")

        def event(delta: dict[str, str], reason: str | None = None) -> str:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
            return f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"

        yield event({"role": "assistant", "content": ""})
        while piece is not None:
            yield event({"content": piece})
            piece = await pieces.get()
        try:
            answer: Answer = await answering
        except Exception as error:
            yield f"data: {json.dumps(_error(_failure(error)))}\n\n"
            return
        yield event({}, answer.reason)
        if with_usage:
            yield f"data: {json.dumps({**head, 'choices': [], 'usage': _usage(answer)})}\n\n"
        yield "data: [DONE]\n\n"


async def _alone(lock: asyncio.Lock, submit: Callable[[], asyncio.Future]):
    """Runs elsewhere what has to be alone there: to its end, whoever has stopped waiting for it."""
    await lock.acquire()
    try:
        future = submit()
    except BaseException:
        lock.release()
        raise

    def free(done: asyncio.Future) -> None:
        lock.release()
        if not done.cancelled():
            done.exception()  # looked at, where nobody waits for it any more

    future.add_done_callback(free)
    return await asyncio.shield(future)


def build_app(source: str, revision: str | None, name: str, device: str, dtype: str, fetch_urls: bool) -> FastAPI:
    """The application, with the model loaded; see [`ChatCompletions`]."""
    chat = ChatCompletions(source, revision, name, device, dtype, fetch_urls)
    started = int(time.time())

    @contextlib.asynccontextmanager
    async def until_the_end(_app):
        yield
        for process in multiprocessing.active_children():
            process.terminate()
        chat.reader.shutdown(cancel_futures=True)

    app = FastAPI(openapi_url=None, lifespan=until_the_end)
    app.add_route("/v1/chat/completions", chat, methods=["POST"])

    @app.get("/v1/models")
    async def models():
        entry = {"id": name, "object": "model", "created": started, "owned_by": "aligngpt"}
        return {"object": "list", "data": [entry]}

    @app.get("/health")
    async def health():
        return {"status": "ok"}

    # as OpenAI's clients read errors: with the message in them
    @app.exception_handler(AnyHTTPException)
    async def refuse(_request, error: AnyHTTPException):
        return JSONResponse(_error(error.detail), error.status_code, headers=error.headers)

    return app


def _usage(answer: Answer) -> dict[str, int]:
    asked, given = answer.prompt_tokens, answer.tokens
    return {"prompt_tokens": asked, "completion_tokens": given, "total_tokens": asked + given}


def _busy(why: str) -> HTTPException:
    return HTTPException(503, f"The server is busy ({why}): try again.", headers={"Retry-After": RETRY_AFTER})


def _failure(error: Exception) -> str:
    return f"The server failed at this request ({type(error).__name__}); it goes on."


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}
