"""Blocks with a ReLU whose neurons are as often positive as a real model's: time, bytes, error."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri

import hire_rewrite as hire
from benchmarks import timing
from benchmarks.relu_proofs import Block, share_read
from hire_rewrite.ops.encodings import Float
from hire_rewrite.rules import Rule

DENSE = "dense"
TOLD, PROVED, PROVED4 = "told by the first product", "proved from 8 bits", "proved from 4 bits"
BUDGET = 0.7
"""Of the neurons; a token with more reads all."""

Weights = list[dict[str, Array]]


def shares(real: np.ndarray, n: int, mean: float, rng: np.random.Generator) -> np.ndarray:
    """f64[n], how often each neuron is to be positive: drawn from `real`, and all moved alike on
    the scale of a normal deviate, so that their mean is `mean`."""
    deviates = ndtri(np.clip(rng.choice(real, n), 1e-4, 1 - 1e-4))
    shift = brentq(lambda by: ndtr(deviates + by).mean() - mean, -12, 12)
    return ndtr(deviates + shift)


def made(
    d: int, f: int, layers: int, dtype: Any, real: np.ndarray, mean: float, seed: int = 0
) -> Weights:
    """Random layers. Inputs have the mean square 1, and pre-activations without bias too, so that
    the bias says how often a neuron is positive."""
    rng = np.random.default_rng(seed)

    def matrix(n: int, m: int) -> Array:
        return jnp.asarray(rng.standard_normal((n, m), np.float32) / np.sqrt(n), dtype)

    return [
        {
            "up": matrix(d, f),
            "bias": jnp.asarray(ndtri(shares(real, f, mean, rng)), dtype),
            "down": matrix(f, d),
        }
        for _ in range(layers)
    ]


def forward(params: Weights, x: Array) -> Array:
    """Blocks one after the other, each with arrays of its own: XLA would copy a stack's slices."""
    for w in params:
        wide = x.astype(jnp.float32)
        size = jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True))
        h = (wide * size).astype(x.dtype)
        x = x + jax.nn.relu(h @ w["up"] + w["bias"]) @ w["down"]
    return x


def rules(dtype: Any, mean: float) -> dict[str, Rule]:
    """The sides beside the dense one."""
    positive = functools.partial(
        hire.FFN, k="positive", exact=Float(str(jnp.dtype(dtype))), budget=BUDGET, force=True
    )
    eight = hire.Blocks(8, None, scale="float32")
    return {
        "8 bits everywhere": hire.Linear(encoding=eight, force=True),
        "top k, another model": hire.FFN(k=mean, force=True),
        TOLD: positive(),
        PROVED: positive(predictor=hire.Quantized(8)),
        PROVED4: positive(predictor=hire.Quantized(4)),
        "4 bits, 3 deviations": positive(predictor=hire.Quantized(4), margin=3.0),
    }


def ffn_bytes(rule: hire.FFN, d: int, f: int, dtype: Any, share: float, tokens: int = 1) -> int:
    """Bytes of a block that reads such a share of its neurons for each token; rows of several
    tokens are counted as if they shared none, up to all rows."""
    rows = rule.exact or Float(str(jnp.dtype(dtype)))
    picked = rows.bytes(round(min(1.0, tokens * share) * f), d)
    if rule.predictor is None:
        return rows.bytes(f, d) + picked
    return rule.predictor.bytes(f, d, dtype) + 2 * picked


class Side:
    """A rule packed for layers: its call, what it reads, and how far off it is."""

    def __init__(self, name: str, rule: Rule, params: Weights, x: Array) -> None:
        self.name, self.rule, self._params = name, rule, params
        self._step = hire.transform(forward, rule)
        self._packed = self._step.pack(params, x)
        self._run = jax.jit(self._step.__call__)

    def call(self, x: Array) -> Callable[[], Array]:
        return functools.partial(self._run, self._packed, x)

    def measured(self, x: Array) -> dict[str, float]:
        """The share of neurons read, of positive ones missed, of tokens that ran whole; and the
        relative error of what the layers add, for x: [tokens, d]."""
        results = forward(self._params, x), self._run(self._packed, x)
        want, got = (np.asarray(y, np.float64) - np.asarray(x, np.float64) for y in results)
        found = {"error": float(np.linalg.norm(got - want) / np.linalg.norm(want))}
        sites = self._step.evaluate(self._packed, [(x,)], weights=self._params).sites
        reads = [site.read for site in sites]
        if all(read is not None for read in reads):
            found |= {
                "read": float(np.mean(reads)),
                "missed": 1 - float(np.mean([site.recall for site in sites])),
                "whole": float(np.mean([site.whole for site in sites])),
            }
        return found

    def bytes(self, x: Array, share: float | None) -> int:
        """Of a call, with the share of neurons that is read, if it varies."""
        if share is None:
            return sum(site.bytes_after for site in self._step.plan(self._packed, x).sites)
        up = self._params[0]["up"]
        d, f = up.shape
        assert isinstance(self.rule, hire.FFN)
        one = ffn_bytes(self.rule, d, f, up.dtype, share, len(x))
        return len(self._params) * one


def measure(
    d: int, f: int, dtype: str, mean: float, real: np.ndarray, *, layers: int,
    tokens: Sequence[int], rounds: int, bandwidth: float, only: Sequence[str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """All sides on made layers, for each number of tokens: milliseconds and bytes of a layer."""
    params = made(d, f, layers, dtype, real, mean)
    rng = np.random.default_rng(1)
    xs = jnp.asarray(rng.standard_normal((max(8, *tokens), d)), dtype)
    chosen = rules(dtype, mean)
    sides = [
        Side(name, rule, params, xs[:1])
        for name, rule in chosen.items()
        if only is None or name in only
    ]
    told = {side.name: side.measured(xs[:8]) for side in sides}
    dense, size = jax.jit(forward), layers * 2 * d * f * jnp.dtype(dtype).itemsize
    rows = []
    for count in tokens:
        x = xs[:count]
        calls: dict[str, Callable[[], Any]] = {DENSE: functools.partial(dense, params, x)}
        calls |= {side.name: side.call(x) for side in sides}
        timings = timing.alternate(calls, rounds, cold=True)
        sizes = {DENSE: size}
        sizes |= {side.name: side.bytes(x, told[side.name].get("read")) for side in sides}
        for name in calls:
            row = timings.row(name, DENSE, sizes[name], bandwidth)
            for what in ("median ms", "floor ms", "bytes"):
                row[what] /= layers
            rows.append({"side": name, "tokens": count, **row, **told.get(name, {})})
    return {
        "d": d,
        "f": f,
        "dtype": dtype,
        "mean": mean,
        "layers": layers,
        **statistics(params[0], np.random.default_rng(2)),
        "rows": rows,
    }


def statistics(
    w: Mapping[str, Array], rng: np.random.Generator, tokens: int = 64
) -> dict[str, float]:
    """`positive`, the share of neurons; `again`, how many of a token's are the next one's too."""
    up, bias = (np.asarray(w[name], np.float32) for name in ("up", "bias"))
    x = rng.standard_normal((tokens, up.shape[0]), np.float32)
    return overlap(x @ up + bias > 0)


def overlap(positive: np.ndarray) -> dict[str, float]:
    """Of bool[tokens, f], token after token: see `statistics`."""
    both = (positive[1:] & positive[:-1]).sum(1)
    return {
        "positive": float(positive.mean()),
        "again": float((both / np.maximum(positive[:-1].sum(1), 1)).mean()),
    }


def crossing(
    sizes: Sequence[int], means: Sequence[float], timed: Sequence[float], rounds: int,
    bandwidth: float, *, rows: int = 4096, most: int = 2**27,
) -> list[dict[str, Any]]:  # fmt: skip
    """Where a proof stops to pay: over the length of rows and the share of positive neurons.

    All neurons are positive equally often. Bytes are shares of the dense block's, in float32.

    Args:
      sizes: d of each.
      means, timed: shares of positive neurons; those of which time is measured too.
      rows: neurons that are looked at for the share that is read.
      most: numbers of a matrix that is timed.
    """
    found = []
    for d in sizes:
        f = min(4 * d, most // d)
        for mean in means:
            one = np.full(1, mean)
            (w,) = made(d, rows, 1, "float32", one, mean)
            block = Block(w["up"], w["bias"], w["down"][:, :8])
            x = np.random.default_rng(1).standard_normal((32, d), np.float32)
            row: dict[str, Any] = {"d": d, "f": f, "mean": mean, "read": {}, "bytes": {}}
            chosen = rules("float32", mean)
            for name in (TOLD, PROVED, PROVED4):
                rule, share = chosen[name], mean
                assert isinstance(rule, hire.FFN)
                if isinstance(rule.predictor, hire.Quantized):
                    share = share_read(block, jnp.asarray(x), rule.predictor, "proved")
                row["read"][name] = share
                size = ffn_bytes(rule, d, f, "float32", share)
                row["bytes"][name] = size / (2 * d * f * 4)
            if mean in timed:
                result = measure(
                    d, f, "float32", mean, one, layers=1, tokens=(1,), rounds=rounds,
                    bandwidth=bandwidth, only=(TOLD, PROVED, PROVED4),
                )  # fmt: skip
                row["times"] = {each["side"]: each["ratio"] for each in result["rows"]}
                row["ms"] = {each["side"]: each["median ms"] for each in result["rows"]}
            print(row, flush=True)
            found.append(row)
    return found
