"""What a predictor misses, measured: the operations with exact arithmetic beside the guess.

Everything is a sum over tokens, so that reports of several batches can be added.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from hire_rewrite.ops.ffn.activity import relative_error
from hire_rewrite.ops.ffn.block import Activation, FFNSpec, FFNState
from hire_rewrite.ops.ffn.ffn import guess, kept_down, masked, ranked, topk_mask
from hire_rewrite.ops.ffn.importance import best_mask, with_common
from hire_rewrite.ops.ffn.products import all_down, all_products
from hire_rewrite.ops.head.head import (
    Endpoints,
    HeadSpec,
    HeadState,
    candidates_of,
    certified,
    dense_logits,
    exact_head,
    finished,
)
from hire_rewrite.ops.predictors import Predictor, hopeful
from hire_rewrite.ops.top_k.select import marked, top_k


class Quality(NamedTuple):
    """Sums over tokens; a unit is a group of neurons or a row of the vocabulary.

    Attributes:
      tokens: f32[], how many.
      places: f32[U], how often a unit of the true top k was the predictor's first, second, ...
      hits: f32[k + 1], how many tokens had 0, 1, ... of their true top k among the candidates.
      best: f32[], how many tokens had their greatest unit among the candidates.
      mass: f32[], what the candidates hold of the true top k's mass: of what ranks groups, or of
        the probability of the k greatest logits.
      error: f32[], ‖y − exact‖ / ‖exact‖ of the block's output, or of the logits' probabilities.
      cost: f32[], the same between exact and dense: what the top k itself changes.
      proved: f32[], tokens whose greatest logits were proved.
    """

    tokens: Array
    places: Array
    hits: Array
    best: Array
    mass: Array
    error: Array
    cost: Array
    proved: Array


def measured_ffn(
    x: Array,
    state: FFNState,
    layer: Array | int,
    *,
    spec: FFNSpec,
    activation: Activation,
    predictor: Predictor,
    follow: str,
) -> tuple[Array, Quality]:
    """`masked_ffn` or `exact_ffn` (as `follow` is "hire" or "exact"), and what it misses."""
    scores, guessed = guess(x, state, layer, spec=spec, activation=activation, predictor=predictor)
    common = spec.common_groups
    mask = best_mask(guessed, spec.candidate_groups - common, spec)
    guessed = jnp.pad(guessed, ((0, 0), (common, 0)), constant_values=jnp.inf)
    pre = all_products(x, state, layer, spec)
    got = masked(pre, state, layer, scores, mask, spec, activation)
    h, rank = ranked(pre, state, layer, spec, activation)
    exact = kept_down(h, topk_mask(rank, spec), state, layer, spec)
    dense = all_down(h, state, layer, spec)
    quality = compared(rank, guessed, with_common(mask, spec), spec.k_groups, rank, 0.0)
    quality = quality._replace(
        error=relative_error(got, exact).sum(), cost=relative_error(exact, dense).sum()
    )
    return got if follow == "hire" else exact, quality


def measured_head(
    x: Array,
    state: HeadState,
    layer: Array | int,
    *,
    spec: HeadSpec,
    endpoints: Endpoints,
    predictor: Predictor,
    follow: str,
) -> tuple[tuple[Array, ...], Quality]:
    """`hire_head` or `exact_head` (by `follow`), and what it misses of its last endpoint."""
    scores, found, rows = candidates_of(x, state, layer, spec, endpoints, predictor)
    raw = dense_logits(x, state, layer, spec)
    dense, wanted = endpoints(raw), exact_head(raw, spec=spec, endpoints=endpoints)
    exact = jnp.take_along_axis(raw, rows, axis=-1, mode="promise_in_bounds")
    values = finished(scores, rows, exact, found, spec, endpoints)
    proved = jnp.zeros(())
    if spec.certify:
        values, sure = certified(
            x, state, layer, spec=spec, endpoints=endpoints, predictor=predictor
        )
        proved = sure.sum().astype(jnp.float32)
    last = dense[-1].astype(jnp.float32)
    order = hopeful(scores, state.predictor, layer).astype(spec.out_dtype)
    guessed = endpoints(order)[-1].astype(jnp.float32)
    mask = marked(found[-1], last.shape[-1])
    chance = jax.nn.softmax(last, axis=-1)
    quality = compared(last, guessed, mask, min(spec.k, last.shape[-1]), chance, -jnp.inf)
    got, best = (jax.nn.softmax(z[-1].astype(jnp.float32), axis=-1) for z in (values, wanted))
    quality = quality._replace(
        error=relative_error(got, best).sum(),
        cost=relative_error(best, chance).sum(),
        proved=proved,
    )
    return values if follow == "hire" else wanted, quality


def compared(
    rank: Array, guessed: Array, candidates: Array, k: int, mass: Array, nothing: float
) -> Quality:
    """The quality of a choice, without errors of results.

    Args:
      rank, guessed: [tokens, U], by which units are ranked exactly and by guess.
      candidates: bool[tokens, U].
      mass: f32[tokens, U], not negative.
      nothing: units of this rank are none: if fewer than k are more, the rest of the top k cannot
        be missed.
    """
    tokens, units = rank.shape
    values, best = top_k(rank, k)
    real = values > nothing
    found = jnp.take_along_axis(candidates, best, axis=1) | ~real
    held = jnp.where(real, jnp.take_along_axis(mass, best, axis=1), 0.0)
    held = held / jnp.maximum(held.max(1, keepdims=True), 1e-30)

    def place(row: tuple[Array, Array]) -> Array:
        guesses, which = row
        return (guesses > guesses[which][:, None]).sum(1)

    places = lax.map(place, (guessed, best))
    places = jnp.zeros(units).at[places].add(real.astype(jnp.float32))
    zero = jnp.zeros(())
    return Quality(
        tokens=jnp.float32(tokens),
        places=places,
        hits=jnp.zeros(k + 1).at[found.sum(1)].add(1.0),
        best=found[:, 0].sum().astype(jnp.float32),
        mass=((held * found).sum(1) / jnp.maximum(held.sum(1), 1e-30)).sum(),
        error=zero,
        cost=zero,
        proved=zero,
    )
