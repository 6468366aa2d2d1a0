"""What ranks the neurons of a block, exactly and by guess."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from hire_rewrite.ops.ffn.block import Activation, FFNSpec, FFNState
from hire_rewrite.ops.top_k.select import marked, part_top_k, scatter, top_k


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


def importance(h: Array, norms: Array | None, spec: FFNSpec) -> Array:
    """What ranks each group.

    Args:
      h: [tokens, n], the activations of some neurons in whole groups.
      norms: [n], of those neurons' second rows, for the criterion `"output"` alone.

    Returns:
      f32[tokens, n / group], not negative; infinite for a group that holds a NaN, which must be
      kept to come out of the block.
    """
    values = lax.stop_gradient(h).astype(jnp.float32)
    if spec.criterion == "output":
        assert norms is not None
        values = values * norms[None]
    # Σ h² ranks as its square root does.
    tokens, n = values.shape
    rank = jnp.square(values.reshape(tokens, n // spec.group, spec.group)).sum(-1)
    # With its sign bit set a NaN would rank last.
    return jnp.where(jnp.isnan(rank), jnp.inf, rank)


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
    pre = tuple(jnp.split(scores, spec.projections, axis=1))
    vectors = vectors_of(state, layer, first)
    rank = importance(activation(pre, vectors), norms_of(state, layer, first), spec)
    if spec.sparse:
        gate = pre[spec.gate].astype(jnp.float32)
        if spec.gate_bias is not None:
            gate = gate + vectors[spec.gate_bias].astype(jnp.float32)
        gate = gate.reshape(*rank.shape, spec.group).max(-1)
        below = gate / (1 + jnp.abs(gate)) - 1 if spec.selects else jnp.minimum(gate, 0.0)
        rank = jnp.where(rank == 0, below, rank)
    return rank


def top_groups(h: Array, norms: Array | None, spec: FFNSpec, among: Array | None = None) -> Array:
    """h: [tokens, f] on the k_groups groups of the greatest rank, zero elsewhere.

    This is what the top k of a block means, wherever it is computed. Which groups are kept counts
    as constant in derivatives.

    Args:
      norms: see `importance`.
      among: bool[tokens, G], the groups that may be kept; None for all.
    """
    if among is None and spec.k_groups == spec.groups:
        return h
    rank = importance(h, norms, spec)
    if among is not None:
        rank = jnp.where(among, rank, -1.0)
    kept = best_mask(rank, spec.k_groups, spec)
    if among is not None:
        kept &= among
    return jnp.where(jnp.repeat(kept, spec.group, axis=1), h, jnp.zeros_like(h))


def best_places(rank: Array, count: int, spec: FFNSpec) -> Array:
    """i32[tokens, count], ascending: the groups of the greatest rank, by a partial sort.

    In the order of their places, so that equal ranks are decided as `exact_ffn` does.
    """
    return jnp.sort(part_top_k(rank, count, spec.parts)[1], axis=1)


def best_mask(rank: Array, count: int, spec: FFNSpec) -> Array:
    """bool[tokens, groups]: the `count` groups of the greatest rank."""
    return marked(part_top_k(rank, count, spec.parts)[1], rank.shape[1])


def places(rank: Array, spec: FFNSpec) -> Array:
    """i32[tokens, G]: less than k where `best_mask` marks the k greatest, for every k at once."""
    count = spec.groups // spec.parts
    parts = rank.reshape(rank.shape[0] * spec.parts, count)
    first = lax.broadcasted_iota(jnp.int32, parts.shape, 1)
    place = scatter(jnp.zeros(parts.shape, jnp.int32), top_k(parts, count)[1], first)
    return (place * spec.parts).reshape(rank.shape)


def with_common(mask: Array, spec: FFNSpec) -> Array:
    """bool[tokens, common_groups + n] of mask: [tokens, n]: the common groups are everyone's."""
    common = jnp.ones((mask.shape[0], spec.common_groups), bool)
    return jnp.concatenate([common, mask], axis=1)
