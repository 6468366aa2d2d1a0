"""What a user would pick instead: other libraries' ways to the greatest products.

The modules of MODULES have a `head(rows) -> Side`, and `torch_int8` also the blocks of
`benchmarks.ffn`; `torch_decoder` and `llama_cpp` have whole decode steps. None of the libraries is
needed: what cannot be imported is listed in the results with the reason.

Libraries that compute in threads of their own let these wait busily for the next product, which
takes the cores from whoever is measured next. So they are told not to, before they are imported;
`benchmarks.head` checks that the dense side is as fast as without them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import os
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["MODULES", "THREADS", "TOP", "Found", "Side", "build", "columns", "versions"]

for _name, _value in {
    "OMP_WAIT_POLICY": "PASSIVE",
    "KMP_BLOCKTIME": "0",
    "GOMP_SPINCOUNT": "0",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}.items():
    os.environ.setdefault(_name, _value)

TOP = 64
"""How many of the greatest products every side returns: what sampling needs."""
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
MODULES = {
    "torch int8": "torch_int8",
    "onnxruntime 4-bit": "onnx_4bit",
    "faiss PQ + refine": "faiss_pq",
    "ScaNN": "scann_ah",
}

Found = tuple[np.ndarray, np.ndarray]
"""Values f32[tokens, TOP], descending, and rows int[tokens, TOP]."""


@dataclasses.dataclass(frozen=True, eq=False)
class Side:
    """One way to find the greatest products of a query with the rows.

    Attributes:
      name: with what a reader has to know of its settings.
      search: queries f32[tokens, d] and a number of candidates to what it found: the best of the
        candidates by their exact products. With None, the best by what it guesses.
      ordered: queries and a count to the rows that it would take as so many candidates, in its
        order, int[tokens, count]; None if it cannot tell.
      bytes: candidates (or None) to the bytes that one query reads.
      logits: queries to all products as it guesses them; None if it computes no such thing.
      most: queries that it takes at a time without needing much memory.
      setup_s: seconds that building it took.
    """

    name: str
    search: Callable[[np.ndarray, int | None], Found]
    ordered: Callable[[np.ndarray, int], np.ndarray] | None
    bytes: Callable[[int | None], int]
    logits: Callable[[np.ndarray], Any] | None = None
    most: int = 16
    setup_s: float = 0.0


def versions(*names: str) -> dict[str, str]:
    """Of the libraries of these names that are installed, by default those that have a `head`."""
    found = {}
    for name in names or ("torch", "onnxruntime", "faiss-cpu", "scann"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def columns(d: int) -> int:
    """How many columns of d share a 4-bit code, where rows are coded so.

    One code for two columns is smaller. It is quicker where it reaches the recall that is asked
    for; with the wide heads it does not, with 8192 candidates.
    """
    return 2 if d <= 1024 else 1


def build(make: str, name: str, *args: Any) -> Any:
    """`make(*args)` of the module for one of MODULES, or of that name, or why there is none."""
    try:
        module = importlib.import_module(f"benchmarks.peers.{MODULES.get(name, name)}")
    except ImportError as error:
        return f"not installed ({str(error).splitlines()[0]})"
    try:
        return getattr(module, make)(*args)
    except Exception as error:  # a peer that fails on this machine is no reason to stop
        return f"failed ({type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]})"
