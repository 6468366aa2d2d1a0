"""Heads and blocks alone, dense, rewritten in JAX, and rewritten with the kernels for CPU.

`python -m benchmarks.kernels` writes `results/kernels.json`: medians of alternating calls with cold
caches, the bytes that the plan says a call reads, and the floor that these set. Weights and inputs
are random, so nothing is said of recall.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import hire_rewrite as hire
from benchmarks import timing
from hire_rewrite.ops import kernels
from hire_rewrite.ops.predictors import Predictor
from hire_rewrite.plan import table

HEADS = ((49_152, 576), (131_072, 2048))
BLOCKS = ((576, 1536), (2048, 8192))
TOKENS = (1, 4)


def head(w: Array, x: Array) -> Array:
    return x @ w.T


def block(w: dict[str, Array], x: Array) -> Array:
    return (jax.nn.silu(x @ w["gate"].T) * (x @ w["up"].T)) @ w["down"]


def measure(
    name: str, fn: Callable[..., Array], weights: Any, d: int, rules: list[Any], rounds: int
) -> list[dict[str, Any]]:
    """The times of one function, by tokens in a call and rule."""
    rng = np.random.default_rng(1)
    samples = jnp.asarray(rng.standard_normal((1024, d)), jnp.float32)
    packs = []
    for rule in rules:
        run = hire.transform(fn, rule)
        calibration = [(samples,)] if rule.predictor.wants_calibration else None
        packs.append(run.pack(weights, samples[:1], calibration=calibration))
    bandwidth, rows = timing.bandwidth(), []
    for tokens in TOKENS:
        x = samples[:tokens]
        dense = functools.partial(jax.jit(fn), weights, x)
        sides: dict[str, Callable[[], Any]] = {"dense": dense}
        plans = {}
        for rule, packed in zip(rules, packs, strict=True):
            plans[str(rule.predictor)] = hire.transform(fn, rule).plan(packed, x).sites[0]
            for side in ("JAX", "kernels"):
                sides[f"{rule.predictor}, {side}"] = _compiled(fn, rule, packed, x, side)
        timings = timing.alternate(sides, rounds, cold=True)
        for label, site in plans.items():
            found = {
                "what": name,
                "tokens": tokens,
                "predictor": label,
                "expected": round(site.expected or 0.0, 2),
                "dense ms": round(timings.median("dense") * 1e3, 3),
                "floor ms": round(site.bytes_after / bandwidth * 1e3, 3),
            }
            for side in ("JAX", "kernels"):
                one = f"{label}, {side}"
                found[f"{side} ms"] = round(timings.median(one) * 1e3, 3)
                found[f"{side} ratio"] = round(timings.ratio("dense", one), 2)
            rows.append(found)
    return rows


def _compiled(
    fn: Callable[..., Array], rule: Any, packed: Any, x: Array, side: str
) -> Callable[[], Any]:
    """A call of the rewritten function, compiled with or without the kernels."""
    run = jax.jit(hire.transform(fn, rule).__call__)
    if side == "JAX":
        with mock.patch.object(kernels.cpu, "usable", return_value=False):
            jax.block_until_ready(run(packed, x))
    return functools.partial(run, packed, x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=31)
    rounds = parser.parse_args().rounds
    rows = []
    key = jax.random.key(0)
    for n, d in HEADS:
        w = jax.random.normal(key, (n, d)) / d**0.5
        each: tuple[Predictor, ...] = (hire.LowRank(256), hire.Quantized(8), hire.Quantized(4))
        rules: list[Any] = [hire.Head(k=64, candidates=512, predictor=p, force=True) for p in each]
        rows += measure(f"head {n:,} × {d}", head, w, d, rules, rounds)
    for d, f in BLOCKS:
        w = {name: jax.random.normal(key, (f, d)) / d**0.5 for name in ("gate", "up", "down")}
        some: tuple[Predictor, ...] = (hire.Quantized(8), hire.Quantized(4))
        rules = [hire.FFN(k=0.05, candidates=0.1, predictor=p, force=True) for p in some]
        rows += measure(f"gated FFN {d} / {f}", block, w, d, rules, rounds)
    path = timing.write("kernels", {"rows": rows}, "python -m benchmarks.kernels")
    header = list(rows[0])
    print(table([header, *([str(row[name]) for name in header] for row in rows)]))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
