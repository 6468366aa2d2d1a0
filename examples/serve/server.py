"""The HTTP of it: Starlette, one endpoint in the manner of OpenAI's completions, and metrics.

POST /v1/completions    {"prompt": "...", "max_tokens": 16, "temperature": 0, "stream": false}
GET  /metrics           counters for Prometheus
GET  /health            200 while the model runs
"""

import contextlib
import json
from collections.abc import AsyncIterator

import anyio
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from . import completions, metrics
from .completions import Asked, BadRequest
from .engine import Event, QueueFull, Refused, TooLong
from .runner import Broken, Runner
from .words import Words

LARGEST, SECONDS = 1 << 20, 20
"""Bytes that the body of a request may have, and how long it may take to come."""


def create_app(runner: Runner, words: Words) -> Starlette:
    """The application; its lifespan starts and stops the runner."""
    server = _Server(runner, words)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        runner.start()
        try:
            yield
        finally:
            await anyio.to_thread.run_sync(runner.stop)

    routes = [
        Route("/v1/completions", server.complete, methods=["POST"]),
        Route("/metrics", server.metrics),
        Route("/health", server.health),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


class _Server:
    def __init__(self, runner: Runner, words: Words) -> None:
        self._runner, self._words = runner, words

    async def complete(self, request: Request) -> Response:
        try:
            with anyio.fail_after(SECONDS):
                body = await _body(request)
            if body is None:
                text = f"the body is longer than {LARGEST} bytes"
                return _error(413, text)
            # Off the loop: to tokenize a megabyte takes a while.
            asked = await anyio.to_thread.run_sync(completions.parse, body, self._words)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        except TimeoutError:
            return _error(408, f"the body did not come within {SECONDS} seconds")
        except BadRequest as error:
            return _error(400, str(error), error.param)
        stack = contextlib.AsyncExitStack()
        try:
            events = await stack.enter_async_context(self._runner.serve(asked.request))
        except Refused as refused:
            return _refused(refused)
        if asked.stream:
            return _Stream(self._stream(asked, events), stack)
        async with stack:
            return await self._whole(request, asked, events)

    async def metrics(self, _: Request) -> Response:
        text = metrics.render(self._runner)
        return PlainTextResponse(text, headers={"Content-Type": metrics.CONTENT_TYPE})

    async def health(self, _: Request) -> Response:
        if self._runner.failure is not None:
            return _error(503, "the model has failed")
        return JSONResponse({"status": "ok"})

    async def _stream(self, asked: Asked, events: AsyncIterator[Event]) -> AsyncIterator[str]:
        """Server-sent events."""
        speak = self._words.speaker()
        async for event in events:
            text = "" if event.token is None else speak(event.token)
            if text or event.end is not None:
                part = completions.answer(asked, text, event.end)
                yield f"data: {json.dumps(part)}\n\n"
        yield "data: [DONE]\n\n"

    async def _whole(
        self, request: Request, asked: Asked, events: AsyncIterator[Event]
    ) -> Response:
        """One answer; the request is dropped where the client goes away before."""
        speak, parts, said, end = self._words.speaker(), [], 0, None
        async with anyio.create_task_group() as group:

            async def watch() -> None:
                while (await request.receive())["type"] != "http.disconnect":
                    pass
                group.cancel_scope.cancel()

            group.start_soon(watch)
            async for event in events:
                if event.token is not None:
                    parts.append(speak(event.token))
                    said += 1
                end = event.end
            group.cancel_scope.cancel()
        if end is None:
            return Response(status_code=499)  # nobody reads it
        if end in ("failed", "cancelled"):
            return _error(503, "the model has failed" if end == "failed" else "stopped")
        return JSONResponse(completions.answer(asked, "".join(parts), end, said))


class _Stream(StreamingResponse):
    """A streamed answer, whose request is dropped where the client goes away, before it begins
    too: then its text is never asked for."""

    def __init__(self, text: AsyncIterator[str], request: contextlib.AsyncExitStack) -> None:
        headers = {"Cache-Control": "no-cache"}
        super().__init__(text, media_type="text/event-stream", headers=headers)
        self._request = request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._request:
            await super().__call__(scope, receive, send)


async def _body(request: Request) -> bytes | None:
    """The body of a request; None if it is too long, of which no more is read."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > LARGEST:
            return None
    return bytes(body)


def _refused(refused: Refused) -> Response:
    if isinstance(refused, QueueFull):
        return _error(429, str(refused), headers={"Retry-After": "1"})
    if isinstance(refused, Broken):
        return _error(503, str(refused))
    return _error(400, str(refused), refused.param if isinstance(refused, TooLong) else None)


def _error(
    status: int, message: str, param: str | None = None, headers: dict[str, str] | None = None
) -> Response:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    body = completions.error(message, "rate_limit_error" if status == 429 else kind, param)
    return JSONResponse(body, status, headers)
