"""What rewriting costs besides arithmetic: per call, and once.

`python -m benchmarks.overhead` writes `results/overhead.json`. The model is so small that a call is
nearly all overhead. A call of the plain jitted function is compared with three of the transformed
one: bare (`step(packed, x)`), under a `jax.jit` of the user's, and compiled ahead. Then come
the seconds that each phase takes, once: to trace and detect, to pack, to rewrite.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import hire_rewrite as hire
from benchmarks import timing
from hire_rewrite.graph.trace import trace
from hire_rewrite.passes.detect import detect
from hire_rewrite.plan import table

D, WIDTH, VOCABULARY, LAYERS = 64, 256, 4096, 1
CALLS, ROUNDS, GOAL_US = 200, 31, 30.0
RULES = (
    hire.FFN(k=0.25, candidates=0.5, force=True),
    hire.Head(k=16, candidates=64, force=True),
)


def model(params: Any, x: Array) -> Array:
    for layer in params["layers"]:
        x = x + jax.nn.relu(x @ layer["up"]) @ layer["down"]
    return x @ params["head"].T


def weights() -> Any:
    keys = iter(jax.random.split(jax.random.key(0), 2 * LAYERS + 1))

    def normal(*shape: int) -> Array:
        return jax.random.normal(next(keys), shape) / D**0.5

    layers = [{"up": normal(D, WIDTH), "down": normal(WIDTH, D)} for _ in range(LAYERS)]
    return {"layers": layers, "head": normal(VOCABULARY, D)}


def per_call(rounds: int) -> dict[str, Any]:
    """Microseconds of a call of each side, which is waited for before the next.

    In mode "dense" transformed and plain functions compute the same; in mode "hire" the arithmetic
    differs, and what a bare call adds is what it takes above one under the user's own `jax.jit`.
    """
    params, x = weights(), jnp.ones((1, D))
    plain = jax.jit(model)
    sides: dict[str, Callable[[], Any]] = {"plain jit": functools.partial(plain, params, x)}
    for mode in ("dense", "hire"):
        step = hire.transform(model, *RULES, mode=mode)
        given = params if mode == "dense" else step.pack(params, x)
        under = jax.jit(step.__call__)
        ahead = jax.jit(step.__call__).lower(given, x).compile()
        sides |= {
            f"{mode}: bare": functools.partial(step, given, x),
            f"{mode}: under jit": functools.partial(under, given, x),
            f"{mode}: compiled ahead": functools.partial(ahead, given, x),
        }

    def many(call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            for _ in range(CALLS):
                # One at a time: many in flight would wait for each other.
                result = jax.block_until_ready(call())
            return result

        return run

    timings = timing.alternate({label: many(call) for label, call in sides.items()}, rounds)

    def above(label: str, other: str) -> float:
        pairs = zip(timings.seconds[label], timings.seconds[other], strict=True)
        return round(1e6 * statistics.median(a - b for a, b in pairs) / CALLS, 1)

    return {
        label: {
            "us": round(1e6 * timings.median(label) / CALLS, 1),
            "least us": round(1e6 * timings.least(label) / CALLS, 1),
            "spread": round(timings.spread(label), 3),
            "above plain us": above(label, "plain jit"),
            "above jit us": above(label, f"{label.split(':')[0]}: under jit")
            if ":" in label
            else 0.0,
        }
        for label in sides
    }


def once(rounds: int) -> dict[str, float]:
    """Milliseconds of each phase: medians, each on a function that nothing is known of."""
    params, x = weights(), jnp.ones((1, D))
    seconds: dict[str, list[float]] = {}

    def timed(phase: str, run: Callable[..., Any], *args: Any) -> Any:
        began = time.perf_counter()
        result = run(*args)
        if isinstance(result, hire.Packed):
            jax.block_until_ready(result)
        seconds.setdefault(phase, []).append(time.perf_counter() - began)
        return result

    for _ in range(rounds):

        def fresh(params: Any, x: Array) -> Array:
            return model(params, x)

        traced = timed("trace", trace, fresh, (params, x), {}, (0,))
        timed("detect", detect, traced, 4096)
        step = hire.transform(fresh, *RULES)
        timed("plan (trace, detect, decide)", step.plan, params, x)
        packed = timed("pack", step.pack, params, x)
        timed("rewrite", jax.make_jaxpr(step.__call__), packed, x)
    return {phase: round(1e3 * statistics.median(each), 2) for phase, each in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    rounds = parser.parse_args().rounds
    calls, phases = per_call(rounds), once(max(2, min(5, rounds)))
    result = {
        "model": f"{LAYERS} block of {D} / {WIDTH} and a head of {VOCABULARY:,} × {D}",
        "goal us": GOAL_US,
        "per call": calls,
        "once ms": phases,
    }
    rows = [[label, *map(str, values.values())] for label, values in calls.items()]
    print(table([["", *next(iter(calls.values()))], *rows]))
    print(phases)
    if rounds >= ROUNDS:
        print(f"wrote {timing.write('overhead', result, 'python -m benchmarks.overhead')}")


if __name__ == "__main__":
    main()
