"""Feed-forward blocks beside what a user would pick instead.

`python -m benchmarks.ffn` writes `results/ffn.json`. A block is relu(gate x) · (up x), of which the
5 % of the neurons with the greatest |h| · ‖row of down‖ count. Each predictor takes as few
candidates as recall 99 % of these; then all sides alternate, with cold caches. Ratios are to the
dense block in JAX, of which a model that was trained with a top k needs no more than these 5 %.

Weights and inputs of the smallest block are those of a layer of SmolLM2, with ReLU in the place of
its SiLU; the others are put together of parts of those, as `benchmarks.structured` says. The
results have the share of Σ (|h| · ‖row of down‖)² that the 5 % hold.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import hire_rewrite as hire
from benchmarks import peers, real, timing
from benchmarks.structured import draw_queries, draw_rows
from hire_rewrite.ops.predictors import Predictor
from hire_rewrite.plan import table

LAYER, FITTED, MEASURED, TOKENS = 15, 4096, 1024, (1, 4)
SIZES = ((2048, 8192), (4096, 11_008))
K, GOAL, GROUPS, ROUNDS = 0.05, 0.99, (1, 8), 31
SHARES = (0.06, 0.07, 0.08, 0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.4)
DENSE = "jax f32"

Weights = dict[str, Array]


def block(w: Weights, x: Array) -> Array:
    return (jax.nn.relu(x @ w["gate"].T) * (x @ w["up"].T)) @ w["down"]


def rule(predictor: Predictor, group: int, candidates: float) -> Any:
    return hire.FFN(
        k=K, candidates=candidates, predictor=predictor, group=group, criterion="output", force=True
    )


def own_predictors(d: int) -> list[Predictor]:
    """A low rank takes long to fit, and misses the goal: it is tried on a small block alone."""
    low: list[Predictor] = [hire.LowRank(d // 4)] if d <= 1024 else []
    return [hire.Quantized(4), hire.Quantized(8), *low]


def at_recall(
    predictor: Predictor, group: int, weights: Weights, samples: Array, tokens: Array
) -> tuple[Any, Any, Any, float]:
    """The rewritten block with the fewest candidates that recall enough, or the most of SHARES.

    Returns:
      The transformed function, its `Packed`, the report on the site, and seconds to pack.
    """
    calibration = [(samples,)] if predictor.wants_calibration else None
    packed = None
    for share in SHARES:
        step = hire.transform(block, rule(predictor, group, share))
        began = time.perf_counter()
        if packed is None:
            packed = step.pack(weights, tokens[:1], calibration=calibration)
            seconds = time.perf_counter() - began
        else:  # the arrays are the same whatever the candidates
            arrays = jax.tree.leaves(packed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of no calibration: these are shapes
                shapes = step.pack(*jax.eval_shape(lambda *each: each, weights, tokens[:1]))
            packed = jax.tree.unflatten(jax.tree.structure(shapes), arrays)
        site = step.evaluate(packed, [(tokens,)]).sites[0]
        if min(site.recall) >= GOAL:
            break
    return step, packed, site, seconds


def measure(
    name: str, weights: dict[str, np.ndarray], samples: np.ndarray, tokens: np.ndarray,
    rounds: int, with_peers: bool,
) -> dict[str, Any]:  # fmt: skip
    """All sides on one block."""
    arrays = {key: jnp.asarray(matrix) for key, matrix in weights.items()}
    d = arrays["gate"].shape[1]
    own = []
    for predictor in own_predictors(d):
        for group in GROUPS:
            found = at_recall(predictor, group, arrays, jnp.asarray(samples), jnp.asarray(tokens))
            own.append((f"{predictor}, groups of {group}", *found))
            print(f"{name}: {own[-1][0]}: {own[-1][3].recall}", flush=True)
    missing: dict[str, str] = {}
    others: dict[str, Callable[[np.ndarray], Any]] = {}
    if with_peers:
        made = peers.build(
            "blocks", "torch int8", *(weights[key] for key in ("gate", "up", "down"))
        )
        if isinstance(made, str):
            missing["torch"] = made
        else:
            others = made
    bandwidth, rows = timing.bandwidth(), []
    dense = functools.partial(jax.jit(block), arrays)
    size = sum(matrix.nbytes for matrix in weights.values())
    sizes = {DENSE: size, "torch f32": size, "torch int8": size // 4}
    for count in TOKENS:
        x = tokens[:count]
        calls: dict[str, Callable[[], Any]] = {DENSE: functools.partial(dense, jnp.asarray(x))}
        for label, run in others.items():
            calls[label] = functools.partial(run, x)
        for label, step, packed, *_ in own:
            calls[label] = functools.partial(jax.jit(step.__call__), packed, jnp.asarray(x))
        timings = timing.alternate(calls, rounds, cold=True)
        for label in (DENSE, *others):
            row = _times(label, count, sizes[label], timings, bandwidth)
            rows.append({"ours": False} | row | _error(others.get(label), dense, tokens))
        for label, step, packed, site, seconds in own:
            read = step.plan(packed, jnp.asarray(x)).sites[0].bytes_after
            row = _times(label, count, read, timings, bandwidth)
            more = {
                "k": site.k,
                "candidates": site.candidates,
                "recall": round(min(site.recall), 4),
                "reached": min(site.recall) >= GOAL,
                "error to top k": round(site.error_exact, 5),
                "setup s": round(seconds, 1),
            }
            rows.append({"ours": True} | row | more)
    return {
        "what": name,
        "measured tokens": len(tokens),
        "share of squares": share(arrays, jnp.asarray(tokens)),
        "read_gb_s": round(bandwidth / 1e9, 2),
        "missing": missing,
        "rows": rows,
    }


@jax.jit
def _squares(w: Weights, x: Array) -> tuple[Array, Array]:
    h = jax.nn.relu(x @ w["gate"].T) * (x @ w["up"].T)
    squares = jnp.square(h * jnp.linalg.norm(w["down"], axis=1))
    best = jax.lax.top_k(squares, math.ceil(K * squares.shape[1]))[0]
    return best.sum(1), squares.sum(1)


def share(weights: Weights, tokens: Array) -> float:
    """The share of Σ (|h| · ‖row of down‖)² that the greatest 5 % of neurons hold."""
    best, every = _squares(weights, tokens)
    return round(float((best / every).mean()), 3)


def _error(
    run: Callable[[np.ndarray], Any] | None, dense: Callable[..., Array], tokens: np.ndarray
) -> dict[str, float]:
    """The mean relative error of another library's block."""
    if run is None:
        return {}
    some = tokens[:64]
    want, got = np.asarray(dense(jnp.asarray(some))), np.asarray(run(some))
    wrong = np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)
    return {"error to dense": round(float(wrong.mean()), 5)}


def _times(
    label: str, tokens: int, size: int, timings: timing.Timings, bandwidth: float
) -> dict[str, Any]:
    return {
        "side": label,
        "tokens": tokens,
        **timings.row(label, DENSE, size, bandwidth),
        "times floor": round(timings.median(label) * bandwidth / size, 2),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ffn", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--sizes", nargs="*", help='such as "2048x8192" or "smollm2"; all')
    parser.add_argument("--no-peers", action="store_true")
    asked = parser.parse_args(arguments)
    weights, inputs = real.block(LAYER, FITTED + MEASURED)
    f, d = weights["gate"].shape
    blocks: list[dict[str, Any]] = []
    result = {"k": K, "goal": GOAL, "libraries": peers.versions(), "blocks": blocks}
    for size in ((d, f), *SIZES):
        named = "smollm2" if size == (d, f) else "{}x{}".format(*size)
        if asked.sizes and named not in asked.sizes:
            continue
        given, seen, kind = weights, inputs, f"layer {LAYER} of SmolLM2, with ReLU"
        if named != "smollm2":
            given = {
                key: draw_rows(matrix, size[1], size[0], seed)
                for seed, (key, matrix) in enumerate(weights.items())
            }
            parts = inputs[:FITTED], inputs[FITTED:]
            drawn = [draw_queries(part, len(part), size[0], seed=3) for part in parts]
            seen = np.concatenate(drawn)
            kind = "structured random"
        name = "gated FFN {:,} / {:,}, {}".format(*size, kind)
        fitted, tokens = seen[:FITTED], seen[FITTED:]
        found = measure(name, given, fitted, tokens, asked.rounds, not asked.no_peers)
        blocks.append(found)
        _show(found)
    if asked.sizes is None and asked.rounds >= ROUNDS and not asked.no_peers:
        print(f"wrote {timing.write('ffn', result, 'python -m benchmarks.ffn')}")


def _show(found: dict[str, Any]) -> None:
    header = ["side", "tokens", "k", "candidates", "recall", "median ms", "spread", "ratio",
              "floor ms", "times floor", "error to top k", "error to dense"]  # fmt: skip
    rows = [[str(row.get(name, "")) for name in header] for row in found["rows"]]
    print(f"\n{found['what']}, share of squares {found['share of squares']}")
    print(table([header, *rows]))


if __name__ == "__main__":
    main()
