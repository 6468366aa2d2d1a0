"""What ranks the neurons of a block, exactly and by guess."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax

from hire_rewrite.ops.ffn.block import Activation, FFNSpec, FFNState
from hire_rewrite.ops.top_k.select import marked, part_top_k, threshold_mask


def vectors_of(state: FFNState, layer: Array | int, first: int = 0) -> tuple[Array, ...]:
    """Each vector of a layer, of its groups from `first` on: [n]."""
    return tuple(
        lax.dynamic_index_in_dim(vector, layer, keepdims=False)[first:].reshape(-1)
        for vector in state.vectors
    )


def norms_of(state: FFNState, layer: Array | int, first: int = 0) -> Array | None:
    """The norms of a layer's second rows, of its groups from `first` on: [n]."""
    if state.norms is None:
        return None
    return lax.dynamic_index_in_dim(state.norms, layer, keepdims=False)[first:].reshape(-1)


def importance(
    h: Array,
    pre: Sequence[Array],
    vectors: Sequence[Array],
    norms: Array | None,
    spec: FFNSpec,
    activation: Activation,
) -> Array:
    """What ranks each group.

    Args:
      h: [tokens, n], the activations of some neurons in whole groups.
      pre: for each projection the products that they were made of, [tokens, n].
      vectors, norms: of those neurons, each [n].

    Returns:
      f32[tokens, n / group], not negative; infinite for a group that holds a NaN, which must be
      kept to come out of the block.
    """
    if spec.criterion == "gate" and spec.projections > 1:
        ones = jnp.ones_like(pre[spec.gate])
        h = activation(
            tuple(p if i == spec.gate else ones for i, p in enumerate(pre)), tuple(vectors)
        )
    values = lax.stop_gradient(h).astype(jnp.float32)
    if spec.criterion == "output":
        assert norms is not None
        values = values * norms
    values = values.reshape(values.shape[0], -1, spec.group)
    if spec.reduction == "max":
        found = jnp.abs(values).max(-1)
    elif spec.reduction == "sum":
        found = jnp.abs(values).sum(-1)
    else:  # Σ h² ranks as its square root does
        found = jnp.square(values).sum(-1)
    # With its sign bit set a NaN would rank last.
    return jnp.where(jnp.isnan(found), jnp.inf, found)


def guessed_importance(
    scores: Array, state: FFNState, layer: Array | int, spec: FFNSpec, activation: Activation
) -> Array:
    """What ranks each group that is not common, by predicted products.

    Args:
      scores: [tokens, spec.scored_rows].

    Returns:
      f32[tokens, G - common_groups]. Groups that the predictor takes for zero are below zero:
      those that it nearly took for more come first.
    """
    first = spec.common_groups
    scores = scores.astype(spec.up_dtype)
    parts = dict(zip(spec.scored, jnp.split(scores, len(spec.scored), axis=1), strict=True))
    ones = jnp.ones_like(parts[spec.gate])
    pre = tuple(parts.get(i, ones) for i in range(spec.projections))
    vectors, norms = vectors_of(state, layer, first), norms_of(state, layer, first)
    h = activation(pre, vectors)
    rank = importance(h, pre, vectors, norms, spec, activation)
    if spec.sparse:
        gate = pre[spec.gate].astype(jnp.float32)
        if spec.gate_bias is not None:
            gate = gate + vectors[spec.gate_bias].astype(jnp.float32)
        gate = gate.reshape(gate.shape[0], -1, spec.group).max(-1)
        below = gate / (1 + jnp.abs(gate)) - 1 if spec.selects else jnp.minimum(gate, 0.0)
        rank = jnp.where(rank == 0, below, rank)
    return rank


def best_places(rank: Array, count: int, spec: FFNSpec) -> Array:
    """i32[tokens, count], ascending: the groups of the greatest rank, by a partial sort.

    In the order of their places, so that equal ranks are decided as `exact_ffn` does.
    """
    return jnp.sort(part_top_k(rank, count, spec.parts)[1], axis=1)


def best_mask(rank: Array, count: int, spec: FFNSpec) -> Array:
    """bool[tokens, groups]: the `count` groups of the greatest rank (or fewer, by a threshold)."""
    if spec.selection == "threshold":
        parts = rank.reshape(rank.shape[0], spec.parts, -1)
        return threshold_mask(parts, count // spec.parts).reshape(rank.shape)
    return marked(part_top_k(rank, count, spec.parts)[1], rank.shape[1])


def with_common(mask: Array, spec: FFNSpec) -> Array:
    """bool[tokens, common_groups + n] of mask: [tokens, n]: the common groups are everyone's."""
    common = jnp.ones((mask.shape[0], spec.common_groups), bool)
    return jnp.concatenate([common, mask], axis=1)
