"""Continuous batching: requests join and leave a fixed number of slots, between two steps.

Pure bookkeeping: what computes is a `Backend`, and nothing here knows of HTTP. `submit` and
`cancel` may be called from any thread; one thread calls `tick` again and again. A tick reads at
most one chunk of one prompt and then decodes a token in every slot that has its prompt, so that a
long prompt delays the answers of others by one chunk at a time.
"""

import collections
import dataclasses
import threading
from typing import NamedTuple, Protocol

import numpy as np


@dataclasses.dataclass(frozen=True)
class Request:
    """What a client asks for.

    Attributes:
      name: told apart from all others by it.
      prompt: tokens, at least one.
      max_tokens: how many tokens to say at most, at least one.
      temperature: what logits are divided by; 0 for the likeliest token.
      seed: of what is drawn.
    """

    name: str
    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0


class Event(NamedTuple):
    """What became of a request: a token, or its end ("stop", "length" or "cancelled"), or both."""

    name: str
    token: int | None
    end: str | None


class Draw(NamedTuple):
    """How tokens are chosen, for each slot: f32, u32 and i32[slots]; a draw depends on the seed and
    the place in the text alone."""

    temperature: np.ndarray
    seed: np.ndarray
    place: np.ndarray


class Backend(Protocol):
    """A model with slots."""

    @property
    def slots(self) -> int: ...
    @property
    def max_len(self) -> int: ...
    @property
    def chunk(self) -> int: ...

    def read(self, slot: int, tokens: np.ndarray, start: int, length: int, draw: Draw) -> int:
        """Read a chunk of a prompt, tokens: i32[chunk] of which `length` are real, from position
        `start` on; the token to say after it, chosen by `draw` of one slot."""
        ...

    def decode(self, token: np.ndarray, active: np.ndarray, draw: Draw) -> np.ndarray:
        """Read token: i32[slots] in the active slots, bool[slots]; the next ones, i32[slots]."""
        ...


class Refused(Exception):  # noqa: N818 (an answer to a client)
    """Why a request is not taken."""


class TooLong(Refused):
    """Prompt and answer together are longer than a slot; `param` names which to shorten."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class QueueFull(Refused):
    """As many requests wait as may."""


@dataclasses.dataclass
class _Slot:
    request: Request
    read: int = 0  # tokens of the prompt
    said: int = 0
    last: int = 0

    @property
    def decoding(self) -> bool:
        return self.said > 0


class Engine:
    """The slots of a backend, and the requests that wait for one.

    Args:
      queue: how many requests may wait.
      end: the token that ends an answer, and is not part of it; None for none.
    """

    def __init__(self, backend: Backend, *, queue: int, end: int | None = None) -> None:
        if backend.max_len % backend.chunk:
            raise ValueError(
                f"chunks of {backend.chunk} tokens do not divide max_len={backend.max_len}"
            )
        self.backend, self._limit, self._end = backend, queue, end
        self._queue: collections.deque[Request] = collections.deque()
        self._slots: list[_Slot | None] = [None] * backend.slots
        self._cancelled: set[str] = set()
        self._lock = threading.Lock()

    def check(self, request: Request) -> None:
        """Raise `TooLong` if a request does not fit a slot."""
        prompt, most = len(request.prompt), self.backend.max_len
        if prompt + request.max_tokens > most:
            raise TooLong(
                f"the prompt has {prompt} tokens and the answer up to {request.max_tokens}: "
                f"together no more than {most} fit",
                "max_tokens" if prompt < most else "prompt",
            )

    def submit(self, request: Request) -> None:
        """Have a request wait for a slot.

        Raises:
          Refused: it is too long, or too many wait.
        """
        self.check(request)
        with self._lock:
            if len(self._queue) >= self._limit:
                raise QueueFull(f"{self._limit} requests are waiting, which is the limit")
            self._queue.append(request)

    def cancel(self, name: str) -> None:
        """Drop a request at the next tick, wherever it is; nothing if it has ended."""
        with self._lock:
            self._cancelled.add(name)

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def busy(self) -> int:
        """Slots that have a request."""
        return sum(slot is not None for slot in self._slots)

    @property
    def idle(self) -> bool:
        """Whether a tick would do nothing."""
        return not (self._queue or self.busy or self._cancelled)

    def tick(self) -> list[Event]:
        """Let requests join and leave, read one chunk, decode one token in each slot."""
        events = self._join_and_leave()
        reading = [(i, s) for i, s in enumerate(self._slots) if s is not None and not s.decoding]
        if reading:  # the one that has most of its prompt, so that it soon decodes
            events += self._read(*max(reading, key=lambda item: item[1].read))
        active = np.array([slot is not None and slot.decoding for slot in self._slots])
        if active.any():
            events += self._decode(active)
        return events

    def _join_and_leave(self) -> list[Event]:
        with self._lock:
            dropped, self._cancelled = self._cancelled, set()
            gone = [request.name for request in self._queue if request.name in dropped]
            self._queue = collections.deque(r for r in self._queue if r.name not in dropped)
            for i, slot in enumerate(self._slots):
                if slot is not None and slot.request.name in dropped:
                    gone.append(slot.request.name)
                    self._slots[i] = None
                if self._slots[i] is None and self._queue:
                    self._slots[i] = _Slot(self._queue.popleft())
        return [Event(name, None, "cancelled") for name in gone]

    def _read(self, number: int, slot: _Slot) -> list[Event]:
        chunk, prompt = self.backend.chunk, slot.request.prompt
        part = prompt[slot.read : slot.read + chunk]
        tokens = np.zeros(chunk, np.int32)
        tokens[: len(part)] = part
        token = self.backend.read(number, tokens, slot.read, len(part), self._draw([slot]))
        slot.read += len(part)
        return self._say(number, slot, token) if slot.read == len(prompt) else []

    def _decode(self, active: np.ndarray) -> list[Event]:
        token = np.array([0 if slot is None else slot.last for slot in self._slots], np.int32)
        chosen = self.backend.decode(token, active, self._draw(self._slots))
        events: list[Event] = []
        for number, slot in enumerate(self._slots):
            if slot is not None and active[number]:
                events += self._say(number, slot, int(chosen[number]))
        return events

    def _say(self, number: int, slot: _Slot, token: int) -> list[Event]:
        name = slot.request.name
        if token == self._end:
            self._slots[number] = None
            return [Event(name, None, "stop")]
        slot.said, slot.last = slot.said + 1, token
        last = slot.said == slot.request.max_tokens
        if last:
            self._slots[number] = None
        return [Event(name, token, "length" if last else None)]

    @staticmethod
    def _draw(slots: list[_Slot] | list[_Slot | None]) -> Draw:
        def each(of: str, dtype: type) -> np.ndarray:
            values = (0 if slot is None else getattr(slot.request, of) for slot in slots)
            return np.array([*values], dtype)

        place = [0 if s is None else len(s.request.prompt) + s.said for s in slots]
        return Draw(
            each("temperature", np.float32), each("seed", np.uint32), np.array(place, np.int32)
        )
