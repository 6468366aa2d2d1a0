"""Heads, blocks and whole decode steps on a GPU, dense and rewritten, in bfloat16.

    make gpu        # some minutes; writes benchmarks/results/gpu.json and docs/gpu.md

A step for one token takes a GPU less than to be called: so every side is one program that runs
`CALLS` of them, one behind the other, each with inputs of its own. Sides alternate, as
`benchmarks.timing` says. Weights are normally distributed, so that nothing is said of recall.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

import hire_rewrite as hire
from benchmarks import timing
from benchmarks.decode_1b import LENGTH, LLAMA_1B, random_weights
from benchmarks.markdown import table
from examples.smollm2 import model
from hire_rewrite.rules import Rule

CALLS, ROUNDS, BATCHES = 32, 15, (1, 4, 8)
HEADS = ((131_072, 2048), (262_144, 2048))
BLOCKS = ((2048, 8192), (4096, 11_008))
HEAD_PREDICTORS = (hire.LowRank(256), hire.Quantized(8), hire.Quantized(4))
BLOCK_PREDICTORS = (hire.LowRank(128), hire.Quantized(8), hire.Quantized(4))
PAGE = Path(__file__).parents[1] / "docs" / "gpu.md"

Weights = Any


def head(rows: Array, x: Array) -> Array:
    return jnp.argmax(x @ rows.T, -1)


def block(w: dict[str, Array], x: Array) -> Array:
    return (jax.nn.silu(x @ w["gate"]) * (x @ w["up"])) @ w["down"]


def head_rule(predictor: Any) -> Rule:
    return hire.Head(k=64, candidates=1024, predictor=predictor, force=True)


def block_rule(predictor: Any) -> Rule:
    return hire.FFN(k=0.05, candidates=0.10, predictor=predictor, force=True)


def normal(seed: int, *shape: int) -> Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def repeated(fn: Callable[..., Array]) -> Callable[..., Any]:
    """`fn` of weights and x: [batch, d] for each of x: [CALLS, batch, d], one after the other."""

    def run(weights: Weights, inputs: Array) -> Array:
        def call(total: Array, x: Array) -> tuple[Array, None]:
            # The next call waits for the result of this one.
            y = fn(weights, x + (total * 0).astype(x.dtype))
            return total + y.sum().astype(jnp.float32), None

        return lax.scan(call, jnp.float32(0), inputs)[0]

    return jax.jit(run)


def decoded(step: Callable[..., Any]) -> Callable[..., Any]:
    """`CALLS` greedy tokens of a decode step."""

    def run(weights: Weights, token: Array, cache: model.Cache) -> Array:
        def call(carry: tuple[Array, model.Cache], _: None) -> tuple[Any, None]:
            logits, cache = step(weights, *carry)
            return (jnp.argmax(logits, -1).astype(jnp.int32), cache), None

        return lax.scan(call, (token, cache), None, CALLS)[0][0]

    return jax.jit(run)


def measure(
    what: str,
    fn: Callable[..., Any],
    weights: Weights,
    rules: Mapping[str, Sequence[Rule]],
    loop: Callable[[Callable[..., Any]], Callable[..., Any]],
    inputs: Callable[[int], tuple[Any, ...]],
    example: Callable[[int], tuple[Any, ...]],
    bandwidth: float,
) -> list[dict[str, Any]]:
    """The dense function and its rewritten forms, at every batch size.

    Args:
      rules: of each side, by its name.
      loop: makes of a function of a call one that calls it `CALLS` times.
      inputs: of `loop(fn)` and `example`: of `fn`, behind the weights, by the batch size.
    """
    steps = {name: hire.transform(fn, *given) for name, given in rules.items()}
    packed = {}
    for name, step in steps.items():
        start = time.perf_counter()
        packed[name] = jax.block_until_ready(step.pack(weights, *example(1)))
        print(f"{what}: {name} packed in {time.perf_counter() - start:.1f} s", flush=True)
    whole, rows = sum(leaf.nbytes for leaf in jax.tree.leaves(weights)), []
    for batch in BATCHES:
        sides = {"dense": functools.partial(loop(fn), weights, *inputs(batch))}
        for name, step in steps.items():
            sides[name] = functools.partial(loop(step), packed[name], *inputs(batch))
        timings = timing.alternate(sides, ROUNDS)
        for name in sides:
            saved, status = 0, ""
            if name != "dense":
                sites = steps[name].plan(packed[name], *example(batch)).sites
                saved = sum(site.bytes_before - site.bytes_after for site in sites)
                status = " ".join(f"{site.expected:.2f}" for site in sites if site.expected)
            rows.append(
                {
                    "what": what,
                    "batch": batch,
                    "side": name,
                    "ms": round(timings.median(name) / CALLS * 1e3, 4),
                    "spread": round(timings.spread(name), 3),
                    "times dense": round(timings.ratio("dense", name), 2),
                    "expected": status,
                    "floor ms": round((whole - saved) / bandwidth * 1e3, 4),
                }
            )
            print(rows[-1], flush=True)
    return rows


def layers(bandwidth: float) -> list[dict[str, Any]]:
    """Heads and blocks alone."""

    def inputs(d: int, batch: int) -> tuple[Array]:
        return (normal(1, CALLS, batch, d),)

    def example(d: int, batch: int) -> tuple[Array]:
        return (normal(2, batch, d),)

    rows = []
    for n, d in HEADS:
        rules = {str(p): (head_rule(p),) for p in HEAD_PREDICTORS}
        given = functools.partial(inputs, d), functools.partial(example, d)
        weights = normal(0, n, d)
        rows += measure(f"head {n:,} × {d:,}", head, weights, rules, repeated, *given, bandwidth)
    for d, f in BLOCKS:
        rules = {str(p): (block_rule(p),) for p in BLOCK_PREDICTORS}
        given = functools.partial(inputs, d), functools.partial(example, d)
        w = {"gate": normal(3, d, f), "up": normal(4, d, f), "down": normal(5, f, d)}
        w = {name: matrix / matrix.shape[0] ** 0.5 for name, matrix in w.items()}
        rows += measure(f"FFN {d:,} / {f:,}", block, w, rules, repeated, *given, bandwidth)
    return rows


def whole_step(config: model.Config, bandwidth: float) -> list[dict[str, Any]]:
    """The decode step of a 1.24 B decoder."""
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_weights(config))
    rules = {
        f"FFN by {p}": (block_rule(p), head_rule(HEAD_PREDICTORS[0])) for p in BLOCK_PREDICTORS
    }

    def call(batch: int) -> tuple[Array, model.Cache]:
        cache = model.init_cache(config, batch, LENGTH, jnp.bfloat16)
        return jnp.arange(batch, dtype=jnp.int32) * 1000, cache

    step = functools.partial(model.decode_step, config)
    what = f"decode step, {sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e9:.2f} B"
    return measure(what, step, params, rules, decoded, call, call, bandwidth)


def device_bandwidth() -> float:
    """Bytes a second that the device reads of an array of 2 GB: the best of many sums."""
    array, calls = jnp.ones(2**30, jnp.bfloat16), 8
    total = jax.jit(
        lambda x: lax.fori_loop(0, calls, lambda i, s: s + (x + s.astype(x.dtype)).max(), 0.0)
    )
    best = timing.alternate({"read": lambda: total(array)}, 15).least("read")
    return array.nbytes * calls / best


def page(result: dict[str, Any], machine: dict[str, Any]) -> str:
    """The text of docs/gpu.md."""
    header = ["what", "batch", "side", "ms", "spread", "times dense", "expected", "floor ms"]
    rows = [[str(row[name]) for name in header] for row in result["rows"]]
    return f"""# GPU

{machine["device"]}, jax {machine["jax"]}, everything in bfloat16; `make gpu` writes this page and \
[gpu.json](../benchmarks/results/gpu.json). On a GPU all is plain XLA: the package has no kernels \
of its own there.

Each figure is the time of one call, of {CALLS} in one program: medians of {ROUNDS} rounds, sides \
alternating. "times dense" is the median of the ratios, "expected" what the estimate says of each \
site (1.2 is where a site is rewritten unless a rule forces it, as here), and the floor is the \
weights' bytes over {result["read_gb_s"]:,.0f} GB/s, the fastest read. Heads are \
`Head(k=64, candidates=1024)` behind which the arg max is taken, blocks gated, \
`FFN(k=0.05, candidates=0.10)`; the decode step has the sizes of Llama-3.2-1B, with `LowRank(256)` \
for its head. Weights are random: of recall nothing is said.

{chr(10).join(table(header, rows))}
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--layers", type=int, default=LLAMA_1B.layers, help="of the decode step")
    asked = parser.parse_args(arguments)
    if jax.default_backend() != "gpu":
        sys.exit(f"this machine has no GPU for jax: its backend is {jax.default_backend()}")
    bandwidth = device_bandwidth()
    config = model.Config(**(vars(LLAMA_1B) | {"layers": asked.layers}))
    rows = [*layers(bandwidth), *whole_step(config, bandwidth)]
    result = {"read_gb_s": round(bandwidth / 1e9, 1), "rows": rows}
    timing.write("gpu", result, "python -m benchmarks.gpu")
    PAGE.write_text(page(result, timing.machine()), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
