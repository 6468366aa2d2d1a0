"""Leave out of a dense model what its ReLUs make zero: no training for it, and nothing is lost.

`hire_rewrite.FFN(k="positive")` is for any model with a ReLU. How much it saves depends on how many
neurons are positive; how many those are nobody has to know, and `docs/relu.md` says how it works.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import hire_rewrite as hire

from . import batches, model
from .convert import HEAD, ROWS, convert

# `force`: by the plan's estimate so small a model may gain nothing.
POSITIVE = hire.FFN(k="positive", force=True)
TOLD = POSITIVE.replace(budget=0.7)  # not calibrated, so nothing says how many neurons there are
RULES = {
    "told by the first product": TOLD,
    "proved from 8 bits": POSITIVE.replace(predictor=hire.Quantized(8)),
    "4 bits, 3 standard deviations": POSITIVE.replace(predictor=hire.Quantized(4), margin=3.0),
}


def lossless(
    config: model.Config,
    params: model.Params,
    training: np.ndarray,
    validation: np.ndarray,
    context: int,
    rules: Mapping[str, hire.FFN] = RULES,
) -> list[dict[str, Any]]:
    """For each rule what the blocks read, and the loss on the validation text beside the dense one.

    `losses` are nats per token, dense and rewritten. Of the first rows of the text tokens are also
    decoded one by one, through the dense `decode_step` and the rewritten one: `decoded` has both
    losses, and the greatest difference of two logits. `read` and `missed` are of each layer: the
    share of neurons that are read, and of those that are not zero that are not read. `whole` is the
    share of calls that read all, for they ask for more than the budget. `bytes` are those of the
    FFNs for a token, dense and rewritten; `expected` is how many times as fast as dense the plan
    takes the blocks to be.
    """
    rows = next(batches.in_order(validation, context, ROWS))
    decode_step = functools.partial(model.decode_step, config)
    dense = _decoded(decode_step, params, config, rows)
    found = []
    for name, rule in rules.items():
        packed, site, (loss, _, rewritten) = convert(
            config, params, rule, training, validation, context
        )
        assert site.read is not None
        assert site.whole is not None
        step = hire.transform(decode_step, rule, HEAD, on_miss="ignore")
        call = jnp.zeros(1, jnp.int32), model.init_cache(config, 1, context)
        (planned,) = step.plan(packed, *call)["ffn"]
        assert planned.expected is not None
        logits = _decoded(step, packed, config, rows)
        found.append(
            {
                "way": name,
                "rule": str(rule),
                "losses": {"dense": round(loss, 7), "rewritten": round(rewritten, 7)},
                "decoded": {
                    "tokens": rows[:, 1:].size,
                    "dense": round(_loss(dense, rows[:, 1:]), 7),
                    "rewritten": round(_loss(logits, rows[:, 1:]), 7),
                    "difference": float(np.abs(logits - dense).max()),
                },
                "read": [round(share, 4) for share in site.read],
                "missed": [round(1 - share, 6) for share in site.recall],
                "whole": round(site.whole, 5),
                "bytes": [site.bytes_dense, _bytes(packed, site)],
                "expected": round(planned.expected, 2),
            }
        )
    return found


def _decoded(step: Any, weights: Any, config: model.Config, rows: np.ndarray) -> np.ndarray:
    """f32[rows, n, vocab]: logits after each token of rows: i32[rows, n + 1] but the last, read one
    by one."""

    def turn(weights: Any, cache: model.Cache, token: Array) -> tuple[model.Cache, Array]:
        logits, cache = step(weights, token[None], cache)
        return cache, logits[0]

    @jax.jit
    def row(weights: Any, tokens: Array) -> Array:
        cache = model.init_cache(config, 1, len(tokens))
        return lax.scan(functools.partial(turn, weights), cache, tokens)[1]

    return np.stack([row(weights, tokens[:-1]) for tokens in rows])


def _loss(logits: np.ndarray, targets: np.ndarray) -> float:
    """Nats per token of targets: i32[rows, n], with logits [rows, n, vocab]."""
    wide = logits.astype(np.float64)
    picked = np.take_along_axis(wide, targets[..., None], axis=-1)[..., 0]
    return float((np.logaddexp.reduce(wide, axis=-1) - picked).mean())


def _bytes(packed: hire.Packed, site: hire.SiteReport) -> int:
    """Of all FFNs for a token: what tells the neurons, whole, and the measured share of rows.

    A call that reads all counts for the whole of them.
    """
    arrays = packed.sites[site.name]
    picked, every = (
        sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        for tree in ((arrays.up, arrays.down), arrays)
    )
    assert site.read is not None
    assert site.whole is not None
    share = float(np.mean(site.read))
    return round(every - picked + (share + site.whole * (1 - share)) * picked)
