"""A feed-forward block measured: dense, on its exact top k and rewritten, on the same tokens."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from hire_rewrite.ops.ffn.block import Activation, FFNSpec, FFNState
from hire_rewrite.ops.ffn.ffn import guess, masked
from hire_rewrite.ops.ffn.importance import (
    best_mask,
    importance,
    norms_of,
    top_groups,
    vectors_of,
    with_common,
)
from hire_rewrite.ops.ffn.products import all_down, all_products
from hire_rewrite.ops.predictors import Predictor
from hire_rewrite.ops.quality import Choice, Comparison, Measured

__all__ = ["measured_ffn"]


def measured_ffn(
    x: Array,
    state: FFNState,
    layer: Array | int,
    *,
    spec: FFNSpec,
    activation: Activation,
    predictor: Predictor,
) -> Measured:
    """Results [tokens, d_out] for x: [tokens, d_in]; the units of the choice are groups.

    The rewritten one is `masked_ffn`'s, which is that of `hire_ffn` for any number of tokens.
    """
    scores, guessed = guess(x, state, layer, spec=spec, activation=activation, predictor=predictor)
    common, norms = spec.common_groups, norms_of(state, layer)
    mask = best_mask(guessed, spec.candidate_groups - common, spec)
    pre = all_products(x, state, layer, spec)
    h = activation(pre, vectors_of(state, layer))
    rank = importance(h, norms, spec)
    guessed = jnp.pad(guessed, ((0, 0), (common, 0)), constant_values=jnp.inf)
    choice = Choice(rank, guessed, with_common(mask, spec), spec.k_groups, rank, 0.0)
    exact = all_down(top_groups(h, norms, spec), state, layer, spec)
    rewritten = masked(pre, state, layer, scores, mask, spec, activation)
    dense = all_down(h, state, layer, spec)
    return Measured(exact, rewritten, Comparison(dense, exact, rewritten, choice))
