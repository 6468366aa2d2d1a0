"""llama.cpp on the file that the weights come from, through the package cyllama.

It runs in a process of its own. Its threads meet after each operation of a step, and how they wait
for one another is decided when its library is loaded: busily is faster where the cores are free,
and several times slower where something else wants them, or where a virtual machine takes a busy
core away. Both are tried, and the faster is kept.

The package's library is compiled for AVX2, whatever the processor has beyond it.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cyllama.llama import llama_cpp as native

from benchmarks.peers import THREADS

SPINS = (0, 300_000)
"""Turns of a thread's loop before it sleeps: none, and GNU OpenMP's own number."""
_TRIED = 8  # tokens
_TURNS = 3


class Decoder:
    """A model that decodes in a process of its own, which ends with this one.

    Attributes:
      spins: turns of the loop in which a thread waits before it sleeps.
      own: seconds of each call of `greedy` as llama.cpp itself counts them, without the choice of
        the token.
    """

    def __init__(self, path: Path, length: int, spins: int) -> None:
        self.spins = spins
        self.own: list[float] = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(path), str(length)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
            env=os.environ | {"GOMP_SPINCOUNT": str(spins)},
        )

    def greedy(self, first: int, count: int) -> list[int]:
        """The likeliest tokens, one after another, behind `first` in an empty cache."""
        tokens, seconds = self._ask("greedy", first, count)
        self.own.append(seconds)
        return tokens

    def answer(self, prompt: Sequence[int], count: int) -> list[int]:
        """The likeliest tokens, one after another, behind a prompt, which is read at once."""
        return self._ask("answer", [int(token) for token in prompt], count)

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits: f32[n, vocab] after each of n tokens, which are read one by one."""
        return self._ask("logits", [int(token) for token in tokens])

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _ask(self, *request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        pickle.dump(request, self._process.stdin)
        self._process.stdin.flush()
        return pickle.load(self._process.stdout)


def decoder(path: Path, length: int) -> Decoder:
    """The model at `path` with a cache of `length` tokens, and the better of the ways to wait."""
    tried = [Decoder(path, length, spins) for spins in SPINS]
    least = [float("inf")] * len(tried)
    for _ in range(_TURNS):
        for i, one in enumerate(tried):
            start = time.perf_counter()
            one.greedy(0, _TRIED)
            least[i] = min(least[i], time.perf_counter() - start)
    best = tried.pop(int(np.argmin(least)))
    for other in tried:
        other.close()
    best.own.clear()
    return best


class _Model(native.LlamaModel):  # type: ignore[misc]
    @property
    def n_vocab(self) -> int:  # 0.2.18, the last for Python 3.11, reads it and does not have it
        return self.get_vocab().n_vocab


class _Worker:
    """The model in the other process; methods are those of `Decoder`."""

    def __init__(self, path: str, length: int) -> None:
        native.disable_logging()
        self._model = _Model(path, native.LlamaModelParams())
        settings = native.LlamaContextParams()
        settings.n_ctx = length
        settings.n_threads = settings.n_threads_batch = THREADS
        settings.no_perf = False
        self._context = native.LlamaContext(self._model, settings)
        self._likeliest = native.LlamaSampler(native.LlamaSamplerChainParams())
        self._likeliest.add_greedy()

    def greedy(self, first: int, count: int) -> tuple[list[int], float]:
        self._context.kv_cache_clear()
        self._context.reset_perf_data()
        tokens = self._answer([first], count)
        return tokens, self._context.get_perf_data()["t_eval_ms"] / 1e3

    def answer(self, prompt: list[int], count: int) -> list[int]:
        self._context.kv_cache_clear()
        return self._answer(prompt, count)

    def _answer(self, prompt: list[int], count: int) -> list[int]:
        read, tokens, position = prompt, list[int](), 0
        for _ in range(count):
            self._read(read, position)
            position += len(read)
            read = [self._likeliest.sample(self._context, -1)]
            tokens += read
        return tokens

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        self._context.kv_cache_clear()
        found = []
        for position, token in enumerate(tokens):
            self._read([token], position)
            found.append(np.array(self._context.get_logits(), np.float32))
        return np.stack(found)

    def _read(self, tokens: list[int], position: int) -> None:
        """Read tokens, of which the first has that position."""
        self._context.decode(native.llama_batch_get_one(tokens, position))


def _serve(path: str, length: int) -> None:
    """Answer requests until there is nobody to ask."""
    worker = _Worker(path, length)
    while True:
        try:
            name, *arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(getattr(worker, name)(*arguments), sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]))
