"""Measure the constants of this machine, which decide whether rewriting a site pays.

`python -m benchmarks.machine [FILE]` writes a file that `HIRE_REWRITE_MACHINE` names; without FILE
the user's own, which plans are made by from then on. It takes a few minutes.

Reads are timed one by one, on matrices that fit no cache. What a rewritten site costs besides is
then fitted to whole sites: what the reads leave of their times is the least squares' sum of so much
for each piece, each score and each run; and of a dense site's, of so much for each product.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy.optimize import nnls

from benchmarks import timing
from benchmarks.alone import block, head
from hire_rewrite.api import transform
from hire_rewrite.cost import machine as machines
from hire_rewrite.cost.estimate import estimate
from hire_rewrite.cost.machine import COSTS, KINDS, TOKENS, Machine
from hire_rewrite.graph.trace import trace
from hire_rewrite.ops.gather import gathered_matmul
from hire_rewrite.ops.narrow import block_matmul, matmul
from hire_rewrite.ops.predictors import Quantized
from hire_rewrite.ops.quantize import quantize_blocks, quantize_rows
from hire_rewrite.passes.decide import decide
from hire_rewrite.passes.detect import detect
from hire_rewrite.rules import Rule
from hire_rewrite.sites import Operation
from hire_rewrite.sites.ffn.rule import FFN
from hire_rewrite.sites.head.rule import Head

N, D = 16_384, 2048  # rows of the matrix that is read, and their length
GROUP, FETCHED = 8, 1024  # rows of a group, and groups that are fetched

HEADS = ((32_768, 256, 256), (32_768, 256, 2048), (131_072, 128, 256))
"""Sites that are fitted to: rows, their length, candidates."""
BLOCKS = ((256, 2048), (256, 8192), (1024, 4096))
"""The same: the model's width and the hidden one."""


def measure(rounds: int) -> Machine:
    """The constants of jax's default backend.

    Of each call the quickest counts, for other programs can only slow it down.
    """
    arrays = stored()
    reads = {
        (kind, tokens): call for tokens in TOKENS for kind, call in reads_of(arrays, tokens).items()
    }
    sites = list(timed_sites())
    times = nanoseconds([*reads.values(), *(site.call for site in sites)], rounds)
    rates = {key: time / size(key[0]) for key, time in zip(reads, times, strict=False)}
    constants: dict[str, Any] = {
        # A predictor that looks again does so for each token by itself.
        kind: tuple(rounded(rates.get((kind, n), rates[kind, 1])) for n in TOKENS)
        for kind in KINDS
    }
    machine = Machine("measured", **constants)
    return replaced(machine, costs(machine, sites, times[len(reads) :]))


def nanoseconds(calls: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """How long each takes, with cold caches, without what any call takes."""
    empty = jitted(lambda x: x + 1, jnp.zeros(8))
    sides = {str(i): call for i, call in enumerate([empty, *calls])}
    timings = timing.alternate(sides, rounds, cold=True)
    least, *rest = map(timings.least, sides)
    return [max(1e9 * (time - least), 1.0) for time in rest]


def stored() -> dict[str, Any]:
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


def reads_of(arrays: Mapping[str, Any], tokens: int) -> dict[str, Callable[[], Any]]:
    """A call for each kind of read."""
    x = jax.random.normal(jax.random.key(2), (tokens, D))
    calls: dict[str, Callable[[], Any]] = {}
    for name in ("float32", "bfloat16"):
        w = arrays[name]
        cast = x.astype(w.dtype)
        calls[f"dense_{name}"] = jitted(head, w, cast)
        calls[f"scored_{name}"] = jitted(lambda x, w: matmul(x, w[None], 0), x, w)
        up = w.reshape(1, N // GROUP, 1, GROUP, D)  # a loop would copy what it reshapes itself
        calls[f"fetched_{name}"] = jitted(_gathered, cast, up, arrays["groups"])
    integers, scale = arrays["int8"]
    calls["scored_int8"] = jitted(lambda x, rows: matmul(x, rows, 0), x, integers)
    state = {"rows": integers, "scale": scale}
    if tokens == 1:
        chosen = (arrays["groups"] * GROUP)[None]
        look = functools.partial(Quantized().score_rows, layer=0)
        again = jitted(lambda x, s, rows: look(s, x, rows=rows), x, state, chosen)
        calls["fetched_int8"] = again
    packed, blocks = arrays["int4"]
    calls["scored_int4"] = jitted(lambda x, w, s: block_matmul(x, w, s, 0), x, packed, blocks)
    return calls


def size(kind: str) -> int:
    """Bytes of a read of `reads_of`."""
    how, dtype = kind.split("_")
    numbers = N * D
    if kind == "fetched_int8":
        return FETCHED * (D + 4)
    if how == "fetched":
        numbers = FETCHED * GROUP * D
    return round(numbers * {"float32": 4, "bfloat16": 2, "int8": 1, "int4": 0.5 + 2 / 32}[dtype])


def _gathered(x: Array, up: Array, groups: Array) -> Array:
    settings = {"compute_dtype": up.dtype, "out_dtype": up.dtype, "precision": None}
    return gathered_matmul(x, up, 0, groups, **settings)


@dataclasses.dataclass(frozen=True)
class TimedSite:
    """A function of one site, dense or rewritten, and its operation."""

    call: Callable[[], Any]
    operation: Operation
    tokens: int
    dense: bool

    def expected(self, machine: Machine) -> float:
        """Nanoseconds."""
        both = estimate(self.operation, self.tokens, machine)
        return both.dense if self.dense else both.rewritten


def timed_sites() -> Iterator[TimedSite]:
    """Heads and blocks for one token and for several."""
    key = jax.random.key(4)
    for n, d, candidates in HEADS:
        rows = jax.random.normal(key, (n, d)) / d**0.5
        yield from _of_tokens(head, Head(k=64, candidates=candidates, force=True), rows, d)
    for d, f in BLOCKS:
        names = ("gate", "up", "down")
        weights = {name: jax.random.normal(key, (f, d)) / d**0.5 for name in names}
        yield from _of_tokens(block, FFN(k=0.05, force=True), weights, d)


def _of_tokens(fn: Callable[..., Array], rule: Rule, weights: Any, d: int) -> Iterator[TimedSite]:
    run = transform(fn, rule)
    packed = run.pack(weights, jnp.ones((1, d)))
    for tokens in (1, 4):
        x = jax.random.normal(jax.random.key(3), (tokens, d))
        _, (decision,) = decide(detect(trace(fn, (weights, x), {}, (0,)), [rule]), [rule], {})
        yield TimedSite(jitted(run.__call__, packed, x), decision.op, tokens, dense=False)
        yield TimedSite(jitted(fn, weights, x), decision.op, tokens, dense=True)


def costs(machine: Machine, sites: Sequence[TimedSite], times: Sequence[float]) -> dict[str, float]:
    """The `COSTS` that explain best what the reads leave of the sites' times."""
    factors, rest = [], []
    for site, time in zip(sites, times, strict=True):
        base = site.expected(machine)
        priced = (replaced(machine, {name: 1.0}) for name in COSTS)
        factors.append([(site.expected(one) - base) / time for one in priced])
        rest.append((time - base) / time)
    solution, _ = nnls(np.array(factors), np.array(rest))
    return dict(zip(COSTS, map(rounded, solution), strict=True))


def replaced(machine: Machine, constants: Mapping[str, Any]) -> Machine:
    return dataclasses.replace(machine, **constants)


def jitted(fn: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    return functools.partial(jax.jit(fn), *args)


def rounded(value: float) -> float:
    return float(f"{value:.3g}")


def text(machine: Machine) -> str:
    """The JSON that `hire_rewrite.cost.machine.load` reads."""
    constants = {name: getattr(machine, name) for name in (*KINDS, *COSTS)}
    about = {"machine": machines.default_name(), **timing.machine()}
    lines = [
        f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}"
        for name, value in {**constants, "about": about}.items()
    ]
    return "{\n  " + ",\n  ".join(lines) + "\n}\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, nargs="?", help="by default the user's own")
    parser.add_argument("--rounds", type=int, default=15)
    asked = parser.parse_args(arguments)
    os.environ[machines.VARIABLE] = "bytes"  # what is measured does not depend on what was
    path = asked.file or machines.file_of(machines.default_name())
    written = text(measure(asked.rounds))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(written, encoding="utf-8")
    print(written)
    print(f"wrote {path}" + (f": {machines.VARIABLE}={path} chooses it" if asked.file else ""))


if __name__ == "__main__":
    main()
