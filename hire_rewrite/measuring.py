"""Measure the constants of a machine (see `cost.machine`) with this package's operations.

Reads are timed one by one, on matrices that fit no cache. What a rewritten site costs besides is
then fitted to whole sites: what the reads leave of their times is the least squares' sum of so much
for each piece, each score and each run; and of a dense site's, of so much for each product.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hire_rewrite.api import transform
from hire_rewrite.cost.estimate import estimate
from hire_rewrite.cost.machine import COSTS, KINDS, TOKENS, Machine
from hire_rewrite.graph.trace import trace
from hire_rewrite.ops.ffn.block import FFNSpec, FFNState
from hire_rewrite.ops.ffn.products import fetched_products
from hire_rewrite.ops.predictors import Quantized
from hire_rewrite.ops.products import block_product, product, quantize_blocks, quantize_rows
from hire_rewrite.passes.decide import Decision, decide, min_width
from hire_rewrite.passes.detect import detect
from hire_rewrite.rules import FFN, Head, Rule

__all__ = ["measured"]

N, D = 16_384, 2048  # rows of the matrix that is read, and their length
GROUP, FETCHED = 8, 1024  # rows of a group, and groups that are fetched
_CACHE = 256 * 2**20  # bytes that fill every cache

_LIMIT = 60.0  # seconds, after which no further round begins

_HEADS = ((32_768, 256, 256), (32_768, 256, 2048), (131_072, 128, 256))
"""Sites that are fitted to: rows, their length, candidates."""
_BLOCKS = ((256, 2048), (256, 8192), (1024, 4096))
"""The same: the model's width and the hidden one."""


def measured(rounds: int = 15) -> Machine:
    """The constants of jax's default backend.

    Args:
      rounds: calls of each kind, unless they take longer than a minute; the quickest counts, for
        other programs can only slow it down.
    """
    arrays = _arrays()
    reads = {
        (kind, tokens): call for tokens in TOKENS for kind, call in _reads(arrays, tokens).items()
    }
    sites = list(_sites())
    times = _times([*reads.values(), *(site.call for site in sites)], rounds)
    found = {key: time / _size(key[0]) for key, time in zip(reads, times, strict=False)}
    constants: dict[str, Any] = {
        # A predictor that looks again does so for each token by itself.
        kind: tuple(_rounded(found.get((kind, n), found[kind, 1])) for n in TOKENS)
        for kind in KINDS
    }
    machine = Machine("measured", **constants)
    return _with(machine, _costs(machine, sites, times[len(reads) :]))


def _with(machine: Machine, costs: Mapping[str, Any]) -> Machine:
    return dataclasses.replace(machine, **costs)


def _times(calls: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """Nanoseconds of each, with cold caches, and without what any call takes.

    All are called once a round, so that each has its share of the machine's quiet moments.
    """
    cache, empty = jnp.ones(_CACHE // 4), jax.jit(lambda x: x + 1)
    every: list[Callable[[], Any]] = [functools.partial(empty, jnp.zeros(8)), *calls]
    least = [math.inf] * len(every)
    began = time.monotonic()
    for number in range(-2, rounds):  # the first rounds compile
        if number > 2 and time.monotonic() - began > _LIMIT:
            break
        for i, call in enumerate(every):
            _greatest(cache).block_until_ready()
            start = time.perf_counter_ns()
            jax.block_until_ready(call())
            if number >= 0:
                least[i] = min(least[i], time.perf_counter_ns() - start)
    return [max(one - least[0], 1.0) for one in least[1:]]


_greatest = jax.jit(jnp.max)


def _arrays() -> dict[str, Any]:
    """What is read, by how it is stored."""
    w = jax.random.normal(jax.random.key(0), (N, D)) / D**0.5
    half = w.astype(jnp.bfloat16)
    return {
        "float32": w,
        "bfloat16": half,
        "int8": tuple(array[None] for array in quantize_rows(w)),
        "int4": tuple(array[None] for array in quantize_blocks(w, 32)),
        "groups": jax.random.permutation(jax.random.key(1), N // GROUP)[:FETCHED],
    }


def _reads(arrays: Mapping[str, Any], tokens: int) -> dict[str, Callable[[], Any]]:
    """A call for each kind of read."""
    x = jax.random.normal(jax.random.key(2), (tokens, D))
    sides: dict[str, Callable[[], Any]] = {}
    for name in ("float32", "bfloat16"):
        w = arrays[name]
        own = x.astype(w.dtype)
        sides[f"dense_{name}"] = _jitted(lambda x, w: x @ w.T, own, w)
        sides[f"scored_{name}"] = _jitted(lambda x, w: product(x, w[None], 0), x, w)
        spec, groups = _spec(w.dtype), arrays["groups"]
        up = w.reshape(1, N // GROUP, 1, GROUP, D)  # a loop would copy what it reshapes itself
        sides[f"fetched_{name}"] = _jitted(functools.partial(_fetch, spec), own, up, groups)
    integers, scale = arrays["int8"]
    sides["scored_int8"] = _jitted(lambda x, rows: product(x, rows, 0), x, integers)
    state = {"rows": integers, "scale": scale}
    if tokens == 1:
        chosen = (arrays["groups"] * GROUP)[None]
        look = functools.partial(Quantized().score_rows, layer=0)
        again = _jitted(lambda x, s, rows: look(s, x, rows=rows), x, state, chosen)
        sides["fetched_int8"] = again
    packed, blocks = arrays["int4"]
    sides["scored_int4"] = _jitted(lambda x, w, s: block_product(x, w, s, 0), x, packed, blocks)
    return sides


def _size(kind: str) -> int:
    """Bytes of a read of `_reads`."""
    how, stored = kind.split("_")
    numbers = N * D
    if kind == "fetched_int8":
        return FETCHED * (D + 4)
    if how == "fetched":
        numbers = FETCHED * GROUP * D
    return round(numbers * {"float32": 4, "bfloat16": 2, "int8": 1, "int4": 0.5 + 2 / 32}[stored])


def _spec(dtype: Any) -> FFNSpec:
    return FFNSpec(
        N, GROUP, 1, FETCHED, FETCHED, up_dtype=dtype, down_dtype=dtype, precision=None,
        compute_dtype=dtype,
    )  # fmt: skip


def _fetch(spec: FFNSpec, x: Array, up: Array, groups: Array) -> tuple[Array, ...]:
    return fetched_products(x, FFNState(up, up[:, :, 0], (), {}), 0, groups, spec)


@dataclasses.dataclass(frozen=True)
class _Site:
    """A function of one site, dense or rewritten, and what it was decided to be."""

    call: Callable[[], Any]
    decision: Decision
    tokens: int
    dense: bool

    def expected(self, machine: Machine) -> float:
        """Nanoseconds."""
        found, spec = self.decision.found, self.decision.spec
        assert spec is not None
        both = estimate(found, spec, Quantized(), self.tokens, machine=machine)
        return both.dense if self.dense else both.rewritten


def _sites() -> Iterator[_Site]:
    """Heads and blocks for one token and for several."""
    key = jax.random.key(4)
    for n, d, candidates in _HEADS:
        rows = jax.random.normal(key, (n, d)) / d**0.5
        yield from _of_tokens(_head, Head(k=64, candidates=candidates, force=True), rows, d)
    for d, f in _BLOCKS:
        names = ("gate", "up", "down")
        weights = {name: jax.random.normal(key, (f, d)) / d**0.5 for name in names}
        yield from _of_tokens(_block, FFN(k=0.05, force=True), weights, d)


def _of_tokens(fn: Callable[..., Array], rule: Rule, weights: Any, d: int) -> Iterator[_Site]:
    run = transform(fn, rule)
    packed = run.pack(weights, jnp.ones((1, d)))
    for tokens in (1, 4):
        x = jax.random.normal(jax.random.key(3), (tokens, d))
        detection = detect(trace(fn, (weights, x), {}, (0,)), min_width([rule]))
        _, (decision,) = decide(detection, [rule], {})
        yield _Site(_jitted(run.__call__, packed, x), decision, tokens, dense=False)
        yield _Site(_jitted(fn, weights, x), decision, tokens, dense=True)


def _costs(machine: Machine, sites: Sequence[_Site], times: Sequence[float]) -> dict[str, float]:
    """The `COSTS` that explain best what the reads leave of the sites' times."""
    factors, rest = [], []
    for site, took in zip(sites, times, strict=True):
        base = site.expected(machine)
        more = (site.expected(_with(machine, {name: 1.0})) - base for name in COSTS)
        factors.append([one / took for one in more])
        rest.append((took - base) / took)
    return dict(zip(COSTS, map(_rounded, _fitted(factors, rest)), strict=True))


def _head(w: Array, x: Array) -> Array:
    return x @ w.T


def _block(w: Mapping[str, Array], x: Array) -> Array:
    return (jax.nn.silu(x @ w["gate"].T) * (x @ w["up"].T)) @ w["down"]


def _fitted(factors: Sequence[Sequence[float]], wanted: Sequence[float]) -> list[float]:
    """The solution of least squares without negative numbers."""
    matrix, target = np.array(factors), np.array(wanted)
    best, least = np.zeros(matrix.shape[1]), float(np.square(target).sum())
    for count in range(1, matrix.shape[1] + 1):
        for kept in itertools.combinations(range(matrix.shape[1]), count):
            own = np.linalg.lstsq(matrix[:, kept], target, rcond=None)[0]
            error = float(np.square(matrix[:, kept] @ own - target).sum())
            if (own >= 0).all() and error < least:
                best, least = np.zeros(matrix.shape[1]), error
                best[list(kept)] = own
    return list(map(float, best))


def _jitted(fn: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    return functools.partial(jax.jit(fn), *args)


def _rounded(value: float) -> float:
    return float(f"{max(value, 0.0):.3g}")
