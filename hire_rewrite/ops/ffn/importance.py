"""What ranks the neurons of a block, exactly and by guess."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from hire_rewrite.ops.ffn.block import FFNSpec
from hire_rewrite.ops.ffn.layer import BlockLayer
from hire_rewrite.ops.predictors import Predictor
from hire_rewrite.ops.quality import lengths
from hire_rewrite.ops.top_k.keys import below_zero
from hire_rewrite.ops.top_k.select import marked, scatter, sharded_top_k, top_k

__all__ = [
    "best_mask",
    "best_places",
    "guess",
    "importance",
    "places",
    "top_groups",
    "with_common",
]


def guess(x: Array, block: BlockLayer, predictor: Predictor) -> tuple[Array, Array]:
    """What is predicted for x: [tokens, d_in].

    Returns:
      Pre-activations [tokens, spec.scored_rows], all of a projection together; and what ranks the
      groups by them, f32[tokens, G - common_groups] (see `_guessed_importance`).
    """
    spec = block.spec
    projections, shards = spec.projections, spec.num_shards

    def in_order(scores: Array) -> Array:
        """From shard by shard to projection by projection."""
        tokens, n = scores.shape
        split = scores.reshape(tokens, shards, projections, n // (shards * projections))
        return jnp.swapaxes(split, 1, 2).reshape(scores.shape)

    def choose(scores: Array, count: int) -> Array:
        """The rows of the best groups, about `count` of them, i32[tokens, ...]."""
        rank = _guessed_importance(in_order(scores), block)
        groups = rank.shape[1] // shards
        wanted = min(groups, -(-count // (projections * spec.group * shards)))
        best = sharded_top_k(rank, wanted * shards, shards)[1]
        projection = jnp.arange(projections, dtype=best.dtype)[:, None, None]
        first = (best // groups)[None] * projections + projection
        rows = (first * groups + (best % groups)[None])[..., None] * spec.group
        rows = rows + jnp.arange(spec.group, dtype=best.dtype)[None, None, None]
        return jnp.moveaxis(rows, 0, 1).reshape(best.shape[0], -1)

    scores = predictor.score(block.state.predictor, x, block.index, choose)
    scores = in_order(lax.stop_gradient(scores))
    return scores, _guessed_importance(scores, block)


def _guessed_importance(scores: Array, block: BlockLayer) -> Array:
    """What ranks each group that is not common, by predicted pre-activations.

    Groups that the predictor takes for zero are below zero: those that it nearly took for more
    come first.
    """
    spec, first = block.spec, block.spec.common_groups
    pre = tuple(jnp.split(scores.astype(spec.up_dtype), spec.projections, axis=1))
    vectors = block.vectors(first)
    rank = importance(block.activation(pre, vectors), block.norms(first), spec.group)
    if spec.sparse:
        gate = pre[spec.gate].astype(jnp.float32)
        if spec.gate_bias is not None:
            gate = gate + vectors[spec.gate_bias].astype(jnp.float32)[None]
        gate = gate.reshape(*rank.shape, spec.group).max(-1)
        below = below_zero(gate) if spec.selects else jnp.minimum(gate, 0.0)
        rank = jnp.where(rank == 0, below, rank)
    return rank


def importance(h: Array, norms: Array | None, group: int) -> Array:
    """What ranks each group.

    Args:
      h: [tokens, n], the activations of some neurons in whole groups.
      norms: [n], of those neurons' second rows, for the criterion `"output"`; None for `"hidden"`.

    Returns:
      f32[tokens, n / group], the Euclidean norm of each group, of however small or great numbers;
      infinite for a group that holds a NaN, which must be kept to come out of the block.
    """
    values = jnp.abs(lax.stop_gradient(h).astype(jnp.float32))
    if norms is not None:
        values = values * norms[None]
    tokens, n = values.shape
    rank = values
    if group > 1:
        rank = lengths(values.reshape(tokens, n // group, group))
    # With its sign bit set a NaN would rank last.
    return jnp.where(jnp.isnan(rank), jnp.inf, rank)


def top_groups(h: Array, norms: Array | None, spec: FFNSpec, among: Array | None = None) -> Array:
    """h: [tokens, f] on the k_groups groups of the greatest rank, zero elsewhere.

    This is what the top k of a block means, wherever it is computed. Which groups are kept counts
    as constant in derivatives.

    Args:
      norms: see `importance`.
      among: bool[tokens, G], the groups that may be kept; None for all.
    """
    if among is None and (spec.k_groups == spec.groups or spec.keeps_all):
        return h
    if among is not None and spec.keeps_all:
        kept = among
    else:
        rank = importance(h, norms, spec.group)
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
    return jnp.sort(sharded_top_k(rank, count, spec.num_shards)[1], axis=1)


def best_mask(rank: Array, count: int, spec: FFNSpec) -> Array:
    """bool[tokens, groups]: the `count` groups of the greatest rank."""
    return marked(sharded_top_k(rank, count, spec.num_shards)[1], rank.shape[1])


def places(rank: Array, spec: FFNSpec) -> Array:
    """i32[tokens, G]: less than k where `best_mask` marks the k greatest, for every k at once."""
    count = spec.groups // spec.num_shards
    shards = rank.reshape(rank.shape[0] * spec.num_shards, count)
    first = lax.broadcasted_iota(jnp.int32, shards.shape, 1)
    place = scatter(jnp.zeros(shards.shape, jnp.int32), top_k(shards, count)[1], first)
    return (place * spec.num_shards).reshape(rank.shape)


def with_common(mask: Array, spec: FFNSpec) -> Array:
    """bool[tokens, common_groups + n] of mask: [tokens, n]: the common groups are everyone's."""
    common = jnp.ones((mask.shape[0], spec.common_groups), bool)
    return jnp.concatenate([common, mask], axis=1)
