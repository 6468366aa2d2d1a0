"""Each FFN of Marian alone, on the inputs that it has in the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import Array

import hire_rewrite as hire
from benchmarks.relu_blocks import overlap
from benchmarks.relu_proofs import check
from benchmarks.relu_translation import Translation, rules
from hire_rewrite.rules import Rule

CALIBRATED = 512  # tokens


def apart(w: Mapping[str, Array], x: Array) -> Array:
    """A layer's FFN, without its norm."""
    return jax.nn.relu(x @ w["w1"] + w["b1"]) @ w["w2"]


def layer(w: Mapping[str, Array], x: np.ndarray, rule: Rule) -> dict[str, float]:
    """What a rule reads of one FFN on tokens: [n, d], after calibration on the first of them."""
    w = {name: w[name] for name in ("w1", "b1", "w2")}
    step = hire.transform(apart, rule)
    few = min(CALIBRATED, len(x) // 2)
    first, rest = x[:few], x[few:]
    packed = step.pack(w, first[:1], calibration=[(first,)])
    batches = [(rest[i : i + CALIBRATED],) for i in range(0, len(rest), CALIBRATED)]
    (site,) = step.evaluate(packed, batches, weights=w).sites
    assert site.read is not None
    assert site.whole is not None
    return {
        "read": site.read[0],
        "missed": 1 - site.recall[0],
        "whole": site.whole,
        "error": site.error,
    }


def layers(
    translation: Translation, inputs: Mapping[str, list[np.ndarray]], most: int
) -> list[dict[str, Any]]:
    """Of each FFN the share of positive neurons, and what each rule reads."""
    rows = []
    for part, i, block in translation.blocks():
        x = inputs[part][i][:most]
        w = translation.params[part][i]["ffn"]
        row: dict[str, Any] = {"part": part, "layer": i, "tokens": len(x)}
        row |= overlap(x @ np.asarray(block.up) + np.asarray(block.bias) > 0)
        blocks = {name: chosen[0] for name, chosen in rules().items() if chosen}
        row["rules"] = {
            name: layer(w, x, rule) for name, rule in blocks.items() if isinstance(rule, hire.FFN)
        }
        print(row, flush=True)
        rows.append(row)
    return rows


def often(
    translation: Translation, inputs: Mapping[str, list[np.ndarray]]
) -> tuple[np.ndarray, dict[str, float]]:
    """f64[neurons of all layers], how often each is positive; and the layers' mean `overlap`."""
    every = [
        inputs[part][i] @ np.asarray(block.up) + np.asarray(block.bias) > 0
        for part, i, block in translation.blocks()
    ]
    both = [overlap(positive) for positive in every]
    means = {name: float(np.mean([each[name] for each in both])) for name in both[0]}
    return np.concatenate([positive.mean(0) for positive in every]), means


def proofs(
    translation: Translation, inputs: Mapping[str, list[np.ndarray]], most: int
) -> list[dict[str, Any]]:
    """`check` of each FFN under "proved"."""
    rows = []
    for part, i, block in translation.blocks():
        found = check(block, inputs[part][i][:most], hire.Quantized(8))
        rows.append({"what": f"{part} {i}"} | found)
        print(rows[-1], flush=True)
    return rows
