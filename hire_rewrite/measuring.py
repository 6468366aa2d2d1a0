"""Measure the constants of a machine (see `hire_rewrite.machine`) with this package's operations.

Reads are timed one by one, on matrices that fit no cache. What a rewritten site costs besides is
then fitted to whole sites: what the reads leave of their times is the least squares' sum of so much
for each piece, each score and each run.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hire_rewrite.api import transform
from hire_rewrite.machine import COSTS, KINDS, TOKENS, Machine
from hire_rewrite.ops.block import FFNSpec, FFNState
from hire_rewrite.ops.predictors import Quantized
from hire_rewrite.ops.products import block_product, product, quantize_blocks, quantize_rows
from hire_rewrite.ops.rows import fetched_products
from hire_rewrite.passes.decide import decide, min_width
from hire_rewrite.passes.detect import detect
from hire_rewrite.passes.estimate import estimate
from hire_rewrite.passes.trace import trace
from hire_rewrite.rules import FFN, Head, Rule

__all__ = ["measured"]

N, D = 16_384, 2048  # rows of the matrix that is read, and their length
GROUP, FETCHED = 8, 256  # rows of a group, and groups that are fetched
_CACHE = 256 * 2**20  # bytes that fill every cache

_HEADS = ((32_768, 256, 256), (32_768, 256, 2048), (131_072, 128, 256))
"""Sites that are fitted to: rows, their length, candidates."""
_BLOCKS = ((256, 2048), (256, 8192), (1024, 4096))
"""The same: the model's width and the hidden one."""


def measured(say: Callable[[str], None], rounds: int = 15) -> Machine:
    """The constants of jax's default backend.

    Args:
      say: is told what is being measured.
      rounds: calls of each kind; the quickest counts, for other programs can only slow it down.
    """
    clock = _Clock(rounds)
    rows: dict[str, list[float]] = {kind: [] for kind in KINDS}
    arrays = _arrays()
    for tokens in TOKENS:
        say(f"products for {tokens} token(s)")
        for kind, each in clock.of(_reads(arrays, tokens)).items():
            rows[kind].append(each / _size(kind))
    # A predictor that looks again does so for each token by itself.
    rows["fetched_int8"] = rows["fetched_int8"][:1] * len(TOKENS)
    constants: dict[str, Any]
    constants = {kind: tuple(max(_rounded(one), 1e-6) for one in rows[kind]) for kind in KINDS}
    del arrays
    machine = Machine("measured", **constants)
    say("sites")
    return _with(machine, _costs(machine, clock))


def _with(machine: Machine, costs: Mapping[str, Any]) -> Machine:
    return dataclasses.replace(machine, **costs)


class _Clock:
    """Times calls, one of each a round, with cold caches and without what any call takes."""

    def __init__(self, rounds: int) -> None:
        self._rounds = rounds
        self._cache = jnp.ones(_CACHE // 4)
        self._empty: Callable[[], Any] = functools.partial(jax.jit(lambda x: x + 1), jnp.zeros(8))

    def of(self, sides: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
        """Nanoseconds of each side."""
        every: dict[str, Callable[[], Any]] = {"": self._empty, **sides}
        times: dict[str, list[int]] = {name: [] for name in every}
        for number, (name, call) in itertools.product(range(-2, self._rounds), every.items()):
            _greatest(self._cache).block_until_ready()
            start = time.perf_counter_ns()
            jax.block_until_ready(call())
            if number >= 0:  # the first rounds compile
                times[name].append(time.perf_counter_ns() - start)
        found = {name: min(each) for name, each in times.items()}
        return {name: max(found[name] - found[""], 0.0) for name in sides}


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


def _costs(machine: Machine, clock: _Clock) -> dict[str, float]:
    """`piece`, `score` and `site`, fitted to whole sites."""
    known = [_with(machine, {name: 1.0}) for name in COSTS]
    factors, rest = [], []
    for fn, rule, weights, d in _sites():
        for tokens in (1, 4):
            x = jax.random.normal(jax.random.key(3), (tokens, d))
            run = transform(fn, rule)
            packed = run.pack(weights, x)
            call = functools.partial(jax.jit(run.__call__), packed, x)
            took = clock.of({"site": call})["site"]
            detection = detect(trace(fn, (weights, x), {}, (0,)), min_width([rule]))
            _, (decision,) = decide(detection, [rule], {}, machine)
            assert decision.spec is not None

            def expected(one: Machine, decision: Any = decision, tokens: int = tokens) -> float:
                return estimate(
                    decision.found, decision.spec, Quantized(), tokens, machine=one
                ).rewritten

            base = expected(machine)
            factors.append([(expected(one) - base) / took for one in known])
            rest.append((took - base) / took)
    return dict(zip(COSTS, map(_rounded, _fitted(factors, rest)), strict=True))


def _sites() -> list[tuple[Callable[..., Array], Rule, Any, int]]:
    """Functions of weights and tokens, rules for them, weights, and the length of a token."""
    key, found = jax.random.key(4), list[tuple[Callable[..., Array], Rule, Any, int]]()
    for n, d, candidates in _HEADS:
        rule: Rule = Head(k=64, candidates=candidates, force=True)
        found.append((_head, rule, jax.random.normal(key, (n, d)) / d**0.5, d))
    for d, f in _BLOCKS:
        names = ("gate", "up", "down")
        weights = {name: jax.random.normal(key, (f, d)) / d**0.5 for name in names}
        found.append((_block, FFN(k=0.05, force=True), weights, d))
    return found


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
    return float(f"{value:.3g}")
