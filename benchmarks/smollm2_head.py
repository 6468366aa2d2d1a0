"""SmolLM2's vocabulary head alone at batch 1, by several predictors: its time, and its recall."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import hire_rewrite as hire
from benchmarks import timing
from examples.smollm2 import compare
from hire_rewrite.plan import table

RULES = (
    hire.Head(k=64, candidates=256, predictor=hire.LowRank(192), force=True),
    hire.Head(k=64, candidates=512, predictor=hire.LowRank(256), force=True),
    hire.Head(k=64, candidates=512, predictor=hire.LowRank(320), force=True),
    hire.Head(k=64, candidates=256, predictor=hire.Quantized(8), force=True),
)
GOAL = 2.5
ROUNDS = 101


def measure(embed: Array, hidden: Array, fitted: Array) -> dict[str, Any]:
    """Times for the first of hidden: f32[steps, d_model], recall on all of them.

    Args:
      embed: f32[vocab, d_model], the head's rows.
      fitted: f32[n, length, d_model], what predictors are fitted to.
    """
    weights, x = {"embed": embed}, hidden[:1]
    dense = jax.jit(_logits)
    expected = [
        dense(weights, part) for part in jnp.split(hidden, list(range(64, len(hidden), 64)))
    ]
    tokens: dict[str, Any] = {"dense": functools.partial(jax.jit(_token), weights, x)}
    logits: dict[str, Any] = {"dense": functools.partial(dense, weights, x)}
    size = {"dense": embed.nbytes}
    quality = {}
    for rule in RULES:
        name = f"{rule.predictor}, {rule.candidates} candidates"
        head, argmax = hire.transform(_logits, rule), hire.transform(_token, rule)
        packed = head.pack(weights, x, calibration=[(row,) for row in fitted])
        tokens[name] = functools.partial(jax.jit(argmax), packed, x)
        logits[name] = functools.partial(jax.jit(head), packed, x)
        size[name] = sum(site.bytes_after for site in head.plan(weights, x).sites)
        quality[name] = _quality(head, packed, hidden, expected)
    result: dict[str, Any] = {"steps": len(hidden), "quality": quality}
    for what, sides in (("argmax", tokens), ("logits", logits)):
        rate = timing.bandwidth()
        timings = timing.alternate(sides, ROUNDS, cold=True).beside("dense", size, rate)
        goal = f" (goal {GOAL} times)" if what == "argmax" else ""
        print(f"\nThe head alone, batch 1, {what} returned, cold caches, {ROUNDS} rounds{goal}")
        print(_table(timings, quality))
        result[what] = {"read_gb_s": round(rate / 1e9, 2), "sides": timings}
    return result


def _logits(weights: dict[str, Array], hidden: Array) -> Array:
    return hidden @ weights["embed"].T


def _token(weights: dict[str, Array], hidden: Array) -> Array:
    return jnp.argmax(hidden @ weights["embed"].T, axis=-1)


def _quality(
    head: Any, packed: hire.Packed, hidden: Array, expected: list[Array]
) -> dict[str, float]:
    """Agreement and recall of a rewritten head at batch 1, one hidden state after another."""

    @jax.jit
    def compare_all(packed: Any, hidden: Array, expected: Array) -> tuple[Array, Array]:
        got = jax.lax.map(lambda x: head(packed, x[None])[0], hidden)
        same = jnp.argmax(got, axis=-1) == jnp.argmax(expected, axis=-1)
        return same, compare.recall(got, expected)

    parts = jnp.split(hidden, list(range(64, len(hidden), 64)))
    pairs = [compare_all(packed, *part) for part in zip(parts, expected, strict=True)]
    same, recall = (np.concatenate(values) for values in zip(*pairs, strict=True))
    return {
        "same_token": round(float(same.mean()), 4),
        "top_recall": round(float(recall.mean()), 4),
    }


def _table(
    timings: Mapping[str, Mapping[str, float]], quality: Mapping[str, Mapping[str, float]]
) -> str:
    header = ["", "median ms", "spread", "MB read", "floor ms", "times as fast", "same token",
              f"top {compare.TOP} found"]  # fmt: skip
    rows = [header]
    for side, row in timings.items():
        recalls = [f"{value:.1%}" for value in quality.get(side, {}).values()] or ["", ""]
        rows.append(
            [
                side,
                f"{row['median_ms']:.2f}",
                f"{row['spread']:.0%}",
                f"{row['bytes'] / 1e6:.1f}",
                f"{row['floor_ms']:.2f}",
                f"{row['ratio']:.2f}",
                *recalls,
            ]
        )
    return table(rows)
