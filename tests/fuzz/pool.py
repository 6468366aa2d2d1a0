"""Chunks of seeds on all cores."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

_EACH = 8
"""Chunks that a process works on before another takes its place."""

Seeds = tuple[int, int]
"""The first, and the one behind the last."""


def chunks(first: int, count: int, size: int) -> list[Seeds]:
    """`count` seeds in chunks of a size."""
    last = first + count
    return [(i, min(i + size, last)) for i in range(first, last, size)]


def pooled(
    run: Callable[[int, int], Any], todo: Sequence[Seeds], jobs: int
) -> Iterator[tuple[Seeds, Any]]:
    """Each chunk, and what `run` returned of it, as they are done.

    What a process has compiled comes to gigabytes: new ones take over now and then. (A pool that
    replaces its own, max_tasks_per_child, may wait for ever in CPython 3.11.)
    """
    context = multiprocessing.get_context("spawn")
    size = _EACH * jobs
    for some in (todo[i : i + size] for i in range(0, len(todo), size)):
        with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
            running = {pool.submit(run, *seeds): seeds for seeds in some}
            for done in concurrent.futures.as_completed(running):
                yield running[done], done.result()
