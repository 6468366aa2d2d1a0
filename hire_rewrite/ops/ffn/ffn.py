"""The feed-forward block: guess all neurons, compute and use only the greatest.

`hire_ffn` guesses every neuron's activation with a predictor, gathers the first rows of the best
candidates, computes them exactly, keeps the k greatest and gathers the second rows of those alone.

The top k is part of what the block computes: `exact_ffn` has the same meaning in dense arithmetic,
and is what `hire_ffn` arrives at when the candidates include all of the true top k. `masked_ffn`
is `hire_ffn` in dense arithmetic: the same candidates, nothing gathered.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from hire_rewrite.ops.ffn.block import Activation, FFNSpec, FFNState
from hire_rewrite.ops.ffn.importance import (
    best_mask,
    best_places,
    guess,
    importance,
    top_groups,
    with_common,
)
from hire_rewrite.ops.ffn.layer import BlockLayer
from hire_rewrite.ops.predictors import Predictor
from hire_rewrite.ops.top_k.select import marked, sharded_top_k
from hire_rewrite.ops.usage import Usage

__all__ = ["counted_ffn", "dense_ffn", "exact_ffn", "hire_ffn", "masked", "masked_ffn"]


def hire_ffn(
    x: Array,
    state: FFNState,
    layer: Array | int,
    *,
    spec: FFNSpec,
    activation: Activation,
    predictor: Predictor,
    budget: int | None = None,
) -> Array:
    """The block on its top k groups, found among predicted candidates.

    Each token has candidates of its own, and what is not among them is zero for it, so that its
    result does not depend (but for rounding) on the tokens beside it. Rows are gathered once for
    all tokens that ask for them. Where they may be all of the rows, everything is computed and the
    top k are the exact ones.

    Args:
      x: [tokens, d_in].
      state: see `FFNState`.
      layer: i32[], the index into the leading axis of the arrays.
      budget: groups that are gathered for all tokens together, at most; where they ask for more,
        the call runs as `masked_ffn`. None for as many as they may ask for.

    Returns:
      spec.down_dtype[tokens, d_out]. NaN where x is.
    """
    settings: Any = {"spec": spec, "activation": activation, "predictor": predictor}
    return counted_ffn(x, state, layer, **settings, budget=budget)[0]


def counted_ffn(
    x: Array,
    state: FFNState,
    layer: Array | int,
    *,
    spec: FFNSpec,
    activation: Activation,
    predictor: Predictor,
    budget: int | None = None,
) -> tuple[Array, Usage]:
    """`hire_ffn`, and what it read: groups that any token asks for."""
    tokens, common = x.shape[0], spec.common_groups
    if not isinstance(tokens, int) or tokens == 0:  # a symbol, or nobody to gather for
        y = masked_ffn(x, state, layer, spec=spec, activation=activation, predictor=predictor)
        return y, Usage(whole=True)
    room = spec.gathered_groups(tokens, budget) - common
    count = spec.candidate_groups - common
    if common + room >= spec.groups:
        y = exact_ffn(x, state, layer, spec=spec, activation=activation)
        return y, Usage(whole=True)
    block = BlockLayer(state, layer, spec, activation)
    scores, rank = guess(x, block, predictor)
    if tokens == 1:
        places = best_places(rank, count, spec)[0]
        return _gathered(x, block, scores, places, None), Usage(count, common)
    mask = best_mask(rank, count, spec)
    union = mask.any(0)
    wanted, places = union.sum(), _places(union, room)
    candidates = mask[:, places] & (jnp.arange(room) < wanted)[None]

    def gathered() -> Array:
        return _gathered(x, block, scores, places, candidates)

    if room >= min(tokens * count, spec.groups - common):
        return gathered(), Usage(wanted, common)

    def whole() -> Array:
        return masked(block.pre_activations(x), block, scores, mask)

    over = wanted > room
    return lax.cond(over, whole, gathered), Usage(wanted, common, over)


def dense_ffn(
    x: Array, state: FFNState, layer: Array | int, *, spec: FFNSpec, activation: Activation
) -> Array:
    """The block as the model has it, without any top k, for x: [tokens, d_in]."""
    block = BlockLayer(state, layer, spec, activation)
    return block.down(block.hidden(block.pre_activations(x)))


def exact_ffn(
    x: Array, state: FFNState, layer: Array | int, *, spec: FFNSpec, activation: Activation
) -> Array:
    """The block on its true top k groups, in dense arithmetic, for x: [tokens, d_in].

    Differentiable: which groups are kept counts as constant.
    """
    block = BlockLayer(state, layer, spec, activation)
    h = block.hidden(block.pre_activations(x))
    return block.down(top_groups(h, block.norms(), spec))


def masked_ffn(
    x: Array,
    state: FFNState,
    layer: Array | int,
    *,
    spec: FFNSpec,
    activation: Activation,
    predictor: Predictor,
) -> Array:
    """What `hire_ffn` computes for any number of tokens x: [tokens, d_in], in dense arithmetic."""
    block = BlockLayer(state, layer, spec, activation)
    scores, rank = guess(x, block, predictor)
    mask = best_mask(rank, spec.candidate_groups - spec.common_groups, spec)
    return masked(block.pre_activations(x), block, scores, mask)


def masked(pre: tuple[Array, ...], block: BlockLayer, scores: Array, mask: Array) -> Array:
    """`masked_ffn` of what was guessed.

    Args:
      pre: the pre-activations of all neurons, [tokens, f] for each projection.
      scores: those that were predicted.
      mask: bool[tokens, G - common], each token's candidates.
    """
    spec, candidates = block.spec, with_common(mask, block.spec)
    if spec.selects:
        neurons = jnp.repeat(candidates, spec.group, axis=1)
        guesses = jnp.split(scores.astype(spec.up_dtype), spec.projections, axis=1)
        both = zip(pre, guesses, strict=True)
        pre = tuple(jnp.where(neurons, exact, guess) for exact, guess in both)
    return block.down(top_groups(block.hidden(pre), block.norms(), spec, candidates))


def _gathered(
    x: Array, block: BlockLayer, scores: Array, places: Array, candidates: Array | None
) -> Array:
    """The block on groups that are gathered.

    Args:
      scores: predicted pre-activations.
      places: i32[U], numbers of groups behind the common ones.
      candidates: bool[tokens, U], whose they are; None if there is one token, and all are its.
    """
    tokens, spec, common = x.shape[0], block.spec, block.spec.common_groups
    groups = jnp.concatenate([jnp.arange(common, dtype=places.dtype), places + common])
    if candidates is not None:
        candidates = with_common(candidates, spec)
    pre = block.gathered_pre_activations(x, groups)
    if spec.selects:
        h = _selected(pre, block, scores, groups, candidates)
    else:
        h = block.activation(pre, block.gathered_vectors(groups))
    rank = importance(h, block.gathered_norms(groups), spec.group)
    h = h.reshape(tokens, groups.size, spec.group)
    if candidates is not None:
        rank = jnp.where(candidates, rank, -1.0)
        h = jnp.where(candidates[:, :, None], h, jnp.zeros_like(h))
    if tokens == 1 and (candidates is None or spec.num_shards == 1):
        best = sharded_top_k(rank, spec.k_groups, spec.num_shards)[1][0]
        return block.gathered_down(h[:, best], groups[best])
    kept = _best_gathered(rank, groups, candidates, spec)
    h = jnp.where(kept[:, :, None], h, jnp.zeros_like(h))
    if tokens * spec.k_groups < groups.size:
        union = kept.any(0)
        places = _places(union, tokens * spec.k_groups)
        valid = (jnp.arange(places.size) < union.sum())[None, :, None]
        h, groups = jnp.where(valid, h[:, places], jnp.zeros_like(h[:, places])), groups[places]
    return block.gathered_down(h, groups)


def _places(mask: Array, count: int) -> Array:
    """i32[count], where bool[n] is true; then zeros."""
    (places,) = jnp.nonzero(mask, size=count, fill_value=0)
    return places.astype(jnp.int32)


def _best_gathered(rank: Array, groups: Array, candidates: Array | None, spec: FFNSpec) -> Array:
    """bool[tokens, U]: of the groups that were gathered, each token's k_groups of greatest rank."""
    if spec.num_shards == 1 or candidates is None:
        return marked(sharded_top_k(rank, spec.k_groups, spec.num_shards)[1], rank.shape[1])
    full = jnp.full((rank.shape[0], spec.groups), -1.0, rank.dtype)
    full = full.at[:, _real(groups, candidates, spec)].set(rank, mode="drop")
    kept = marked(sharded_top_k(full, spec.k_groups, spec.num_shards)[1], spec.groups)
    return kept[:, groups] & candidates


def _real(groups: Array, candidates: Array, spec: FFNSpec) -> Array:
    """The groups i32[U]; beyond the end, where they change nothing, those that are nobody's: they
    repeat another one."""
    return jnp.where(candidates.any(0), groups, spec.groups)


def _selected(
    pre: tuple[Array, ...],
    block: BlockLayer,
    scores: Array,
    groups: Array,
    candidates: Array | None,
) -> Array:
    """h of the groups where the activation looks at all neurons together, [tokens, n]."""
    spec, shape = block.spec, (scores.shape[0], block.spec.groups, block.spec.group)
    places = groups if candidates is None else _real(groups, candidates, spec)
    every = []
    for exact, guessed in zip(pre, jnp.split(scores, spec.projections, axis=1), strict=True):
        full = guessed.astype(spec.up_dtype).reshape(shape)
        exact = exact.reshape(shape[0], groups.size, spec.group)
        if candidates is not None:
            exact = jnp.where(candidates[:, :, None], exact, full[:, groups])
        full = full.at[:, places].set(exact, mode="drop")
        every.append(full.reshape(shape[0], spec.width))
    h = block.hidden(tuple(every)).reshape(shape)
    return h[:, groups].reshape(shape[0], groups.size * spec.group)
