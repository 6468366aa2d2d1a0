"""The k greatest of n scores, in JAX and by what the rewritten heads and blocks select with.

`python -m benchmarks.top_k` writes `results/top_k.json`. Sides alternate on one vector of normal
numbers, which the caches hold, as they do right after a product. `lax.approx_max_k` may miss some
(recall_target 0.95, its default; on CPU it finds all); the others return what `lax.top_k` does.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax import Array, lax

from benchmarks import recall, timing
from hire_rewrite.ops import kernels
from hire_rewrite.ops.top_k.select import plain_top_k, top_k
from hire_rewrite.plan import table

SIZES = (8192, 32_768, 131_072, 262_144)
KS = (1, 64, 1024)
ROUNDS = 51
PLAIN = "lax.top_k"


def approximate(scores: Array, k: int) -> tuple[Array, Array]:
    values, indices = lax.approx_max_k(scores, k)
    return values, indices


def without_kernels(scores: Array, k: int) -> tuple[Array, Array]:
    with mock.patch.object(kernels.cpu, "usable", return_value=False):
        return top_k(scores, k)


FORMS = {
    PLAIN: plain_top_k,
    "lax.approx_max_k": approximate,
    "ours": top_k,
    "ours, in JAX": without_kernels,
}


def measure(n: int, k: int, rounds: int) -> list[dict[str, Any]]:
    scores = jax.random.normal(jax.random.key(n), (1, n))
    calls = {
        name: functools.partial(jax.jit(functools.partial(form, k=k)), scores)
        for name, form in FORMS.items()
    }
    timings = timing.alternate(calls, rounds)
    wanted = np.asarray(calls[PLAIN]()[1])
    return [
        {
            "n": n,
            "k": k,
            "side": name,
            "recall": round(recall.recall(np.asarray(call()[1]), wanted)[1], 4),
            "median ms": round(1e3 * timings.median(name), 4),
            "spread": round(timings.spread(name), 3),
            "ratio": round(timings.ratio(PLAIN, name), 2),
        }
        for name, call in calls.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.top_k", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    rounds = parser.parse_args().rounds
    rows = [row for n in SIZES for k in KS for row in measure(n, k, rounds)]
    print(table([[*rows[0]], *([str(value) for value in row.values()] for row in rows)]))
    if rounds >= ROUNDS:
        result = {"kernels": kernels.cpu.status(), "rows": rows}
        print(f"wrote {timing.write('top_k', result, 'python -m benchmarks.top_k')}")


if __name__ == "__main__":
    main()
