"""Vocabulary heads beside what a user would pick instead, at equal recall.

`python -m benchmarks.head` writes `results/head.json`. Every side returns the 64 greatest logits
of a query and their rows. A side takes as few candidates as it needs to find 99.9 % of the
greatest and 99 % of the 64 greatest of 1024 queries (`recall.GOAL`); then all sides alternate, with
cold caches. Ratios are to the dense logits in JAX alone, which find no greatest yet.

The head of 49,152 rows is SmolLM2's, with its hidden states on text; predictors are fitted to what
comes before in the same text. The others are put together of parts of those, as
`benchmarks.structured` says.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import hire_rewrite as hire
from benchmarks import peers, real, recall, timing
from benchmarks.peers import TOP, Side
from benchmarks.structured import draw_queries, draw_rows, outstanding
from hire_rewrite.ops.predictors import Predictor, optimistic
from hire_rewrite.ops.top_k.select import top_k
from hire_rewrite.plan import table

FITTED, QUERIES, TOKENS = 8192, 1024, (1, 4)
SIZES = ((131_072, 2048), (32_000, 4096), (262_144, 2048))
ROUNDS = 21
PLAIN = "jax logits"


def logits(rows: Array, x: Array) -> Array:
    return x @ rows.T


def greatest(rows: Array, x: Array) -> tuple[Array, Array]:
    values, found = lax.top_k(x @ rows.T, TOP)
    return values, found


def arg_max(rows: Array, x: Array) -> Array:
    return jnp.argmax(x @ rows.T, -1)


@dataclasses.dataclass(frozen=True, eq=False)
class Own:
    """The rewritten head with one predictor.

    Attributes:
      state: what packing made of the rows: one copy of them serves all predictors.
    """

    predictor: Predictor
    state: Any
    setup_s: float

    def rule(self, candidates: int) -> Any:
        # `force`: every predictor is measured, whether it is expected to pay or not.
        return hire.Head(k=TOP, candidates=candidates, predictor=self.predictor, force=True)

    def compiled(self, fn: Callable[..., Any], candidates: int, x: Array) -> Callable[..., Any]:
        """The rewritten `fn` of queries."""
        step = hire.transform(fn, self.rule(candidates))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of no calibration: these are shapes
            shapes = step.pack(self._shape, jax.ShapeDtypeStruct(x.shape, x.dtype))
        arrays = jax.tree.leaves(self.state)
        packed = jax.tree.unflatten(jax.tree.structure(shapes), arrays)
        return functools.partial(jax.jit(step.__call__), packed)

    def bytes(self, candidates: int | None) -> int:
        step = hire.transform(logits, self.rule(candidates or TOP))
        x = jax.ShapeDtypeStruct((1, self._shape.shape[1]), jnp.float32)
        return step.plan(self._shape, x).sites[0].bytes_after

    def side(self) -> Side:
        @functools.partial(jax.jit, static_argnums=2)
        def order(state: Any, x: Array, count: int) -> Array:
            def choose(scores: Array, count: int) -> Array:
                return top_k(scores, count)[1]

            scores = self.predictor.score(state.predictor, x, 0, choose)
            better = optimistic(scores, state.predictor, 0)[:, : state.rows.shape[1]]
            return choose(better, count)

        def search(queries: np.ndarray, candidates: int | None) -> peers.Found:
            run = self.compiled(greatest, candidates or TOP, jnp.asarray(queries))
            values, found = run(jnp.asarray(queries))
            return np.asarray(values), np.asarray(found)

        def ordered(queries: np.ndarray, count: int) -> np.ndarray:
            return np.asarray(order(self.state, jnp.asarray(queries), count))

        return Side(str(self.predictor), search, ordered, self.bytes, most=16, setup_s=self.setup_s)

    @property
    def _shape(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.state.rows.shape[1:], self.state.rows.dtype)


def _of_first(fn: Callable[[Array, Array], Any]) -> Callable[[Array, Array], Any]:
    """`fn` of rows [1, n, d]."""
    return lambda rows, x: fn(rows[0], x)


def fitted(rows: Array, samples: Array) -> list[Own]:
    """The head with each predictor; cascades are put together of parts that are among them."""
    predictors = own_predictors(*rows.shape)
    found: dict[Predictor, Own] = {}
    kept: Any = None
    for predictor in predictors:
        began = time.perf_counter()
        if isinstance(predictor, hire.Cascade):
            first, second = found[predictor.first], found[predictor.second]
            parts = {"first": first, "second": second}
            arrays = {
                f"{name}_{key}": array
                for name, part in parts.items()
                for key, array in part.state.predictor.items()
            }
            state = kept._replace(predictor=arrays)
            seconds = first.setup_s + second.setup_s
        else:
            rule = hire.Head(k=TOP, predictor=predictor, force=True)
            calibration = [(samples,)] if predictor.wants_calibration else None
            step = hire.transform(logits, rule)
            packed = jax.block_until_ready(step.pack(rows, samples[:1], calibration=calibration))
            (state,) = packed.sites.values()
            kept = state if kept is None else kept
            state = state._replace(rows=kept.rows)
            seconds = time.perf_counter() - began
        found[predictor] = Own(predictor, state, seconds)
    return list(found.values())


def own_predictors(n: int, d: int) -> list[Predictor]:
    """Of a cascade, its parts come first."""
    low, eight = hire.LowRank(max(192, d // 8)), hire.Quantized(8)
    return [hire.Quantized(4), eight, low, hire.Cascade(low, eight, n // 32)]


def exact(rows: Array, queries: np.ndarray) -> np.ndarray:
    """int[q, TOP], the rows of the greatest logits."""
    run = jax.jit(greatest)
    parts = np.split(queries, range(64, len(queries), 64))
    return np.concatenate([np.asarray(run(rows, jnp.asarray(part))[1]) for part in parts])


def at_equal_recall(
    side: Side, n: int, queries: np.ndarray, wanted: np.ndarray
) -> tuple[int, recall.Recall]:
    """How many of n candidates a side needs, and what it recalls with them."""
    ladder = [count for count in recall.LADDER if count <= n]
    parts = np.split(queries, range(side.most, len(queries), side.most))
    if side.ordered is not None:
        orders = (side.ordered(part, ladder[-1]) for part in parts)
        bounds = range(side.most, len(wanted), side.most)
        where = [
            recall.places(*pair) for pair in zip(orders, np.split(wanted, bounds), strict=True)
        ]
        known = recall.by_candidates(np.concatenate(where), ladder)
        return recall.needed(known.__getitem__, ladder)

    def at(count: int) -> recall.Recall:
        found = np.concatenate([side.search(part, count)[1] for part in parts])
        return recall.recall(found, wanted)

    return recall.needed(at, ladder)


def measure(
    name: str, make: Callable[[], np.ndarray], samples: np.ndarray, queries: np.ndarray,
    rounds: int, named: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """All sides on one head, of the rows that `make` returns.

    The copy of the rows that packing makes is the only one that this process keeps, besides those
    of other libraries.
    """
    own = fitted(jnp.asarray(make()), jnp.asarray(samples))
    kept = own[0].state.rows
    rows = np.asarray(kept)[0]
    dense = {
        label: functools.partial(jax.jit(_of_first(fn)), kept)
        for label, fn in ((PLAIN, logits), ("jax arg max", arg_max), (f"jax top {TOP}", greatest))
    }
    first = jnp.asarray(queries[:1])
    alone: float | None = None
    if not any(f"benchmarks.peers.{module}" in sys.modules for module in peers.MODULES.values()):
        only = {PLAIN: functools.partial(dense[PLAIN], first)}
        alone = round(1e3 * timing.alternate(only, rounds, cold=True).median(PLAIN), 3)
    wanted, shown = exact(kept[0], queries), outstanding(kept[0], jnp.asarray(queries[:64]))
    sides: list[Any] = [one.side() for one in own]
    missing = {}
    for peer in named:
        made = peers.build("head", peer, rows)
        if isinstance(made, str):
            missing[peer] = made
        else:
            sides.append(made)
    settings = []
    for side in sides:
        settings.append(at_equal_recall(side, len(rows), queries, wanted))
        print(f"{name}: {side.name}: {settings[-1]}", flush=True)
    bandwidth = timing.bandwidth()
    found = []
    for tokens in TOKENS:
        x = queries[:tokens]
        calls: dict[str, Callable[[], Any]] = {
            label: functools.partial(run, jnp.asarray(x)) for label, run in dense.items()
        }
        for one, (candidates, _) in zip(own, settings, strict=False):
            label = str(one.predictor)
            for kind, fn in (("logits", logits), ("top", greatest)):
                run = one.compiled(fn, candidates, jnp.asarray(x))
                calls[f"{label}, {kind}"] = functools.partial(run, jnp.asarray(x))
        for side, (candidates, _) in list(zip(sides, settings, strict=True))[len(own) :]:
            calls[f"{side.name}, top"] = functools.partial(side.search, x, candidates)
            if side.logits is not None:
                calls[f"{side.name}, logits"] = functools.partial(side.logits, x)
        timings = timing.alternate(calls, rounds, cold=True)
        found += [_dense_row(label, tokens, timings, rows.nbytes, bandwidth) for label in dense]
        for i, (side, setting) in enumerate(zip(sides, settings, strict=True)):
            row = _row(side, *setting, tokens, timings, bandwidth)
            found.append({"ours": i < len(own)} | row)
    together = next(row["median ms"] for row in found if row["side"] == PLAIN)
    return {
        "what": name,
        "queries": len(queries),
        "outstanding": shown,
        "read_gb_s": round(bandwidth / 1e9, 2),
        "jax logits ms": {
            "before peers were loaded": alone,
            "beside them": together,
        },
        "missing": missing,
        "rows": found,
    }


def _dense_row(
    label: str, tokens: int, timings: timing.Timings, size: int, bandwidth: float
) -> dict[str, Any]:
    return {
        "side": label,
        "ours": False,
        "tokens": tokens,
        **timings.row(label, PLAIN, size, bandwidth),
    }


def _row(
    side: Side, candidates: int, got: recall.Recall, tokens: int, timings: timing.Timings,
    bandwidth: float,
) -> dict[str, Any]:  # fmt: skip
    label, size = f"{side.name}, top", side.bytes(candidates)
    row = {
        "side": side.name,
        "tokens": tokens,
        "candidates": candidates,
        "recall": [round(one, 4) for one in got],
        "reached": recall.reaches(got),
        **timings.row(label, PLAIN, size, bandwidth),
        "times floor": round(timings.median(label) * bandwidth / size, 2),
        "setup s": round(side.setup_s, 1),
    }
    alone = f"{side.name}, logits"
    if alone in timings.seconds:
        row["logits ms"] = round(1e3 * timings.median(alone), 3)
        row["logits ratio"] = round(timings.ratio(PLAIN, alone), 2)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.head", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--queries", type=int, default=QUERIES)
    parser.add_argument("--fitted", type=int, default=FITTED)
    parser.add_argument("--sizes", nargs="*", help='such as "131072x2048" or "smollm2"; all')
    parser.add_argument("--peers", nargs="*", choices=list(peers.MODULES), default=peers.MODULES)
    asked = parser.parse_args()
    rows, states = real.head(asked.fitted + asked.queries)
    seen, unseen = states[: asked.fitted], states[asked.fitted :]
    whole = asked.sizes is None and asked.rounds >= ROUNDS and asked.queries == QUERIES
    result: dict[str, Any] = {
        "goal": dict(zip(("greatest", f"{TOP} greatest"), recall.GOAL, strict=True)),
        "libraries": peers.versions(),
        "heads": [],
    }
    for n, d in (rows.shape, *SIZES):
        named = "smollm2" if (n, d) == rows.shape else f"{n}x{d}"
        if asked.sizes and named not in asked.sizes:
            continue
        samples, queries = seen, unseen
        make: Callable[[], np.ndarray] = functools.partial(np.asarray, rows)
        if named != "smollm2":
            make = functools.partial(draw_rows, rows, n, d)
            samples = draw_queries(seen, asked.fitted, d)
            queries = draw_queries(unseen, asked.queries, d, seed=1)
        kind = "SmolLM2's" if named == "smollm2" else "structured random"
        name = f"head {n:,} × {d:,}, {kind}"
        result["heads"].append(measure(name, make, samples, queries, asked.rounds, asked.peers))
        gc.collect()
        _show(result["heads"][-1])
        if whole:
            print(f"wrote {timing.write('head', result, 'python -m benchmarks.head')}", flush=True)


def _show(head: dict[str, Any]) -> None:
    header = ["side", "tokens", "candidates", "recall", "median ms", "spread", "ratio",
              "floor ms", "times floor", "logits ms", "logits ratio", "setup s"]  # fmt: skip
    rows = [[str(row.get(name, "")) for name in header] for row in head["rows"]]
    print(f"\n{head['what']}, {head['jax logits ms']}, {head['outstanding']}")
    print(table([header, *rows]))
    for peer, why in head["missing"].items():
        print(f"{peer}: {why}")


if __name__ == "__main__":
    main()
