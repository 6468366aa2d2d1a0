"""Two models in lockstep on requests that come and go: what one process of a day does."""

import contextlib
import ctypes
import dataclasses
import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import hire_rewrite as hire

from ..smollm2 import text, weights
from . import backend, packs
from .engine import Backend, Draw, Engine, Request
from .words import SmolWords

FORMS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "certify": ("Head(certify=True)", (hire.Head(certify=True),)),
    "default": ("without rules", ()),
}
"""What is compared with the dense model: as it is written, and the rules."""

SLOTS, MAX_LEN = 4, 512
_FIRST = 50
"""Decode steps after which memory and compilations count."""


class Compilations:
    """How many programs XLA has compiled since it was made."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, *_: Any, **__: Any) -> None:
        self.count += "backend_compile" in event


@dataclasses.dataclass
class Pair:
    """A `Backend` of two: both read the same, and the first one's tokens are what is said.

    Attributes:
      steps: decode steps.
      tokens, wrong: tokens that were compared, and those that differ.
    """

    dense: Backend
    rewritten: Backend
    steps: int = 0
    tokens: int = 0
    wrong: int = 0

    @property
    def slots(self) -> int:
        return self.dense.slots

    @property
    def max_len(self) -> int:
        return self.dense.max_len

    @property
    def chunk(self) -> int:
        return self.dense.chunk

    def read(self, slot: int, tokens: np.ndarray, start: int, length: int, draw: Draw) -> int:
        said, other = (
            model.read(slot, tokens, start, length, draw) for model in (self.dense, self.rewritten)
        )
        self.tokens += 1
        self.wrong += said != other
        return said

    def decode(self, token: np.ndarray, active: np.ndarray, draw: Draw) -> np.ndarray:
        said, other = (model.decode(token, active, draw) for model in (self.dense, self.rewritten))
        self.steps += 1
        self.tokens += int(active.sum())
        self.wrong += int(((said != other) & active).sum())
        return said


class Traffic:
    """Requests that come in bursts; some are cancelled, waiting or in the middle of an answer.

    Args:
      words: i32[n], the text that prompts are taken from.
    """

    def __init__(self, engine: Engine, words: np.ndarray, seed: int) -> None:
        self._engine, self._words = engine, words
        self._draw, self._burst, self._count = random.Random(seed), 0, 0
        self._open: list[str] = []

    def tick(self) -> None:
        """What clients do between two steps, and the step."""
        draw, engine = self._draw, self._engine
        if draw.random() < 0.02 or engine.idle:
            self._burst = draw.randint(1, 2 * engine.backend.slots)
        if self._burst and engine.waiting < 2 * engine.backend.slots:
            engine.submit(self._request())
            self._burst -= 1
        if self._open and draw.random() < 0.005:
            engine.cancel(draw.choice(self._open))
        ended = {event.name for event in engine.tick() if event.end is not None}
        self._open = [name for name in self._open if name not in ended]

    def _request(self) -> Request:
        draw, most = self._draw, self._engine.backend.max_len
        length = min(int(draw.expovariate(1 / 60)) + 1, most // 2, len(self._words))
        begin = draw.randrange(len(self._words) - length + 1)
        self._count += 1
        name = str(self._count)
        self._open.append(name)
        prompt = tuple(map(int, self._words[begin : begin + length]))
        return Request(name, prompt, min(int(draw.expovariate(1 / 80)) + 1, most - length))


def together(
    pair: Pair,
    words: np.ndarray,
    steps: int,
    seed: int,
    tell: Callable[[dict[str, Any]], None] = lambda _: None,
    *,
    first: int = _FIRST,
    end: int | None = None,
) -> dict[str, Any]:
    """Run so many decode steps; what `tell` was told last.

    Args:
      words: i32[n], text for prompts.
      tell: called every few steps with what was seen so far: `steps`, `tokens`, `wrong`; `warm`,
        the steps after the first ones; `compiled`, programs that were compiled in these; `rss`,
        bytes of this process.
      first: how many steps the first ones are.
      end: the token that ends an answer.
    """
    engine = Engine(pair, queue=4 * pair.slots, end=end)
    traffic, compilations = Traffic(engine, words, seed), Compilations()
    before = told = 0
    seen: dict[str, Any] = {}
    while pair.steps < steps:
        traffic.tick()
        warm = max(0, pair.steps - first)
        if not warm:
            before = compilations.count
        if pair.steps - told >= 10 or pair.steps >= steps:
            told = pair.steps
            seen = {
                "steps": pair.steps, "tokens": pair.tokens, "wrong": pair.wrong, "warm": warm,
                "compiled": compilations.count - before, "rss": resident(),
            }  # fmt: skip
            tell(seen)
    return seen


def resident() -> int:
    """Bytes of memory that this process has; 0 where the system does not say it.

    What glibc holds free is given back first: that is no memory that anybody has forgotten.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # other C libraries have it not
        ctypes.CDLL(None).malloc_trim(0)
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def run(folder: Path, form: str, steps: int, begin: int, seed: int) -> None:
    """What a process of a day does: start from packed weights if there are some, and go on from
    `begin` steps; a line of JSON for what it sees."""
    parent = os.getppid()

    def tell(line: dict[str, Any]) -> None:
        print(json.dumps(line), flush=True)
        if os.getppid() != parent:
            raise SystemExit("nobody listens any more")

    params, config = weights.load()
    started, pack = time.perf_counter(), folder / "pack"
    how = "loaded" if packs.exists(pack) else "packed"
    if how == "packed":
        decode, _ = backend.functions(config)
        step = hire.transform(decode, *FORMS[form][1])
        packs.save(step.pack(params, *backend.example(config, SLOTS, MAX_LEN)), config, pack)
    packed, rules, _ = packs.load(pack)
    tell({"begun": how, "seconds": time.perf_counter() - started})
    sizes: Any = {"slots": SLOTS, "max_len": MAX_LEN}
    rewritten = backend.Model(config, packed, rules=rules, **sizes)
    dense = backend.Model(config, params, **sizes)
    for model in (dense, rewritten):
        model.warm_up()
    words = SmolWords()
    prompts = text.help_text(20_000, words.tokenizer)
    pair = Pair(dense, rewritten)

    def told(line: dict[str, Any]) -> None:
        tell(line | {"steps": begin + line["steps"]})

    end = words.end
    seen = together(pair, prompts, steps - begin, seed + begin, told, end=end)
    usage = rewritten.telemetry["decode"].summary()
    shares = {name: dataclasses.asdict(site) for name, site in usage.items()}
    told(seen | {"telemetry": shares})
