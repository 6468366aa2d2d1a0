"""Whether the plan is right about what pays: the ratio that it expects, and the one measured.

`python -m benchmarks.estimate` writes `results/estimate.json`: heads and gated FFN blocks alone,
from small to large, all rewritten (`force=True`), in alternating calls with cold caches. The sign
is right where both ratios are on the same side of 1, or the measured one is within 5 % of it. (The
plan rewrites where it expects the machine's `margin`, a little more than 1.)
Weights and inputs are random, so nothing is said of recall.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import hire_rewrite as hire
from benchmarks import timing
from benchmarks.alone import block, head
from hire_rewrite.ops.predictors import Predictor
from hire_rewrite.plan import table
from hire_rewrite.rules import Rule

HEADS = ((32_000, 576), (49_152, 576), (262_144, 576), (131_072, 2048), (32_000, 4096))
BLOCKS = ((576, 1536), (2048, 8192), (4096, 11_008))
TOKENS = (1, 2, 4, 8)
PREDICTORS: tuple[Predictor, ...] = (hire.LowRank(256), hire.Quantized(8), hire.Quantized(4))
NOISE = 0.05
_LONG = 4096  # rows that take minutes to fit a LowRank predictor to


def sites() -> Iterator[tuple[str, Callable[..., Array], Any, int, list[Rule]]]:
    """Names, functions of weights and tokens, weights, the length of a token, and rules."""
    key = jax.random.key(0)
    for n, d in HEADS:
        w = jax.random.normal(key, (n, d)) / d**0.5
        some = PREDICTORS if d < _LONG else PREDICTORS[1:]
        heads: list[Rule] = [hire.Head(k=64, candidates=512, predictor=p, force=True) for p in some]
        yield f"head {n:,} × {d}", head, w, d, heads
    for d, f in BLOCKS:
        weights = {name: jax.random.normal(key, (f, d)) / d**0.5 for name in ("gate", "up", "down")}
        blocks: list[Rule] = [
            hire.FFN(k=0.05, candidates=0.1, predictor=p, force=True) for p in PREDICTORS[1:]
        ]
        yield f"gated FFN {d} / {f}", block, weights, d, blocks


def measure(
    name: str, fn: Callable[..., Array], weights: Any, d: int, rules: list[Rule], rounds: int
) -> list[dict[str, Any]]:
    """The ratios of one function, by tokens in a call and predictor."""
    samples = jnp.asarray(np.random.default_rng(1).standard_normal((1024, d)), jnp.float32)
    runs = [hire.transform(fn, rule) for rule in rules]
    # What `Quantized` does not ask for changes nothing.
    packs = [run.pack(weights, samples[:1], calibration=[(samples,)]) for run in runs]
    rows = []
    for tokens in TOKENS:
        x = samples[:tokens]
        sides: dict[str, Callable[[], Any]] = {"dense": functools.partial(jax.jit(fn), weights, x)}
        for rule, run, packed in zip(rules, runs, packs, strict=True):
            sides[str(rule.predictor)] = functools.partial(jax.jit(run.__call__), packed, x)
        timings = timing.alternate(sides, rounds, cold=True)
        for rule, run, packed in zip(rules, runs, packs, strict=True):
            label = str(rule.predictor)
            expected = run.plan(packed, x).sites[0].expected
            assert expected is not None
            ratio = timings.least("dense") / timings.least(label)
            right = abs(ratio - 1) <= NOISE or (ratio > 1) == (expected > 1)
            row = {
                "what": name,
                "tokens": tokens,
                "predictor": label,
                "dense ms": round(1e3 * timings.least("dense"), 3),
                "rewritten ms": round(1e3 * timings.least(label), 3),
                "expected": round(expected, 2),
                "measured": round(ratio, 2),
                "median ratio": round(timings.ratio("dense", label), 2),
                "sign": "right" if right else "wrong",
            }
            print(*row.values(), flush=True)
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--only", default="", help="sites whose name holds this; writes nothing")
    asked = parser.parse_args()
    rows = [
        row for each in sites() if asked.only in each[0] for row in measure(*each, asked.rounds)
    ]
    plan = hire.inspect(head, jnp.ones((5000, 64)), jnp.ones((1, 64)))
    about = {"expected on": plan.machine, "kernels for CPU": plan.kernels, "rows": rows}
    header = list(rows[0])
    print(table([header, *([str(row[name]) for name in header] for row in rows)]))
    right = sum(row["sign"] == "right" for row in rows)
    print(f"{right} of {len(rows)} signs are right")
    if not asked.only:
        print(f"wrote {timing.write('estimate', about, 'python -m benchmarks.estimate')}")


if __name__ == "__main__":
    main()
