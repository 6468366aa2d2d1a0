"""The thread that drives an engine, and what asyncio hears of it."""

import asyncio
import collections
import contextlib
import logging
import threading
from collections.abc import AsyncIterator

import hire_rewrite as hire

from .engine import Engine, Event, Refused, Request

_REFRESHED = 32
"""Ticks after which telemetry is read again."""


class Broken(Refused):
    """The model failed; nothing is served any more."""


class Runner:
    """Ticks an engine in a thread of its own while there is something to do.

    Attributes:
      telemetry: of the model, a few ticks old.
      ends: how many requests ended in each way.
      tokens: how many were said.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.telemetry: dict[str, hire.Telemetry] = {}
        self.ends: collections.Counter[str] = collections.Counter()
        self.tokens = 0
        self.failure: BaseException | None = None
        self._open: dict[str, tuple[asyncio.AbstractEventLoop, asyncio.Queue[Event]]] = {}
        self._wake, self._stopping = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End after the current tick; requests that are open end as cancelled."""
        self._stopping = True
        self._wake.set()
        self._thread.join()

    @contextlib.asynccontextmanager
    async def serve(self, request: Request) -> AsyncIterator[AsyncIterator[Event]]:
        """The events of a request, whose end is the last; whoever leaves earlier cancels it.

        Raises:
          Refused: it is not taken.
        """
        events: asyncio.Queue[Event] = asyncio.Queue()  # no more than max_tokens + 1
        self._open[request.name] = asyncio.get_running_loop(), events

        async def each() -> AsyncIterator[Event]:
            while True:
                event = await events.get()
                yield event
                if event.end is not None:
                    return

        try:
            # After it is known: what is known when the model fails, or all stops, is told so.
            if self.failure is not None or self._stopping:
                raise Broken("the model has failed" if self.failure else "the server is stopping")
            self.engine.submit(request)
            self._wake.set()
            yield each()
        finally:
            if self._open.pop(request.name, None) is not None:  # it has not ended
                self.engine.cancel(request.name)
                self._wake.set()

    def _run(self) -> None:
        ticks = 0
        try:
            while not self._stopping:
                self._wake.clear()
                if self.engine.idle:
                    self._refresh()
                    self._wake.wait()
                    continue
                for event in self.engine.tick():
                    self._tell(event)
                ticks += 1
                if ticks % _REFRESHED == 0:
                    self._refresh()
        except Exception as failure:  # whatever the model raises: clients must hear of it
            logging.getLogger(__name__).exception("the model failed")
            self.failure = failure
        for name in list(self._open):
            self._tell(Event(name, None, "cancelled" if self.failure is None else "failed"))

    def _refresh(self) -> None:
        telemetry = getattr(self.engine.backend, "telemetry", None)
        self.telemetry = telemetry or {}

    def _tell(self, event: Event) -> None:
        self.tokens += event.token is not None
        known = self._open.get(event.name)
        if event.end is not None:
            self.ends[event.end] += 1
            self._open.pop(event.name, None)
        if known is not None:
            loop, events = known
            with contextlib.suppress(RuntimeError):  # the loop has been closed
                loop.call_soon_threadsafe(events.put_nowait, event)
