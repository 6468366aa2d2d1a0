"""A feed-forward block measured: dense, on its exact top k and rewritten, on the same tokens."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from hire_rewrite.ops.ffn.block import Activation, FFNSpec, FFNState
from hire_rewrite.ops.ffn.ffn import masked
from hire_rewrite.ops.ffn.importance import best_mask, guess, importance, top_groups, with_common
from hire_rewrite.ops.ffn.layer import BlockLayer
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
    block, common = BlockLayer(state, layer, spec, activation), spec.common_groups
    scores, guessed = guess(x, block, predictor)
    mask = best_mask(guessed, spec.candidate_groups - common, spec)
    pre = block.pre_activations(x)
    h = block.hidden(pre)
    rank = importance(h, block.norms(), spec.group)
    guessed = jnp.pad(guessed, ((0, 0), (common, 0)), constant_values=jnp.inf)
    mass = jnp.square(rank)
    choice = Choice(rank, guessed, with_common(mask, spec), spec.k_groups, mass, 0.0)
    exact = block.down(top_groups(h, block.norms(), spec))
    rewritten = masked(pre, block, scores, mask)
    return Measured(exact, rewritten, Comparison(block.down(h), exact, rewritten, choice))
