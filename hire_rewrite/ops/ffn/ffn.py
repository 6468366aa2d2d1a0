"""The feed-forward block: guess all neurons, compute and use only the greatest.

`hire_ffn` guesses every neuron's activation with a predictor, fetches the first rows of the best
candidates, computes them exactly, keeps the k greatest and fetches the second rows of those alone.

The top k is part of what the block computes: `exact_ffn` has the same meaning in dense arithmetic,
and is what `hire_ffn` arrives at when the candidates include all of the true top k. `masked_ffn`
is `hire_ffn` in dense arithmetic: the same candidates, nothing fetched.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import Array, lax

from hire_rewrite.ops.ffn.block import Activation, FFNSpec, FFNState
from hire_rewrite.ops.ffn.importance import (
    best_mask,
    best_places,
    guessed_importance,
    importance,
    norms_of,
    top_groups,
    vectors_of,
    with_common,
)
from hire_rewrite.ops.ffn.products import (
    all_down,
    all_products,
    fetched_down,
    fetched_products,
)
from hire_rewrite.ops.gather import fetch
from hire_rewrite.ops.predictors import Predictor
from hire_rewrite.ops.top_k.select import marked, part_top_k


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
    result does not depend (but for rounding) on the tokens beside it. Rows are fetched once for
    all tokens that ask for them. Where they may be all of the rows, everything is computed and the
    top k are the exact ones.

    Args:
      x: [tokens, d_in].
      state: see `FFNState`.
      layer: i32[], the index into the leading axis of the arrays.
      budget: groups that are fetched for all tokens together, at most; where they ask for more,
        the call runs as `masked_ffn`. None for as many as they may ask for.

    Returns:
      spec.down_dtype[tokens, d_out]. NaN where x is.
    """
    tokens, common = x.shape[0], spec.common_groups
    if not isinstance(tokens, int) or tokens == 0:  # a symbol, or nobody to fetch for
        return masked_ffn(x, state, layer, spec=spec, activation=activation, predictor=predictor)
    room = spec.fetched_groups(tokens, budget) - common
    count = spec.candidate_groups - common
    if common + room >= spec.groups:
        return exact_ffn(x, state, layer, spec=spec, activation=activation)
    scores, rank = guess(x, state, layer, spec=spec, activation=activation, predictor=predictor)
    fetched = functools.partial(_fetched, x, state, layer, scores, spec=spec, activation=activation)
    if tokens == 1:
        return fetched(best_places(rank, count, spec)[0], None)
    mask = best_mask(rank, count, spec)
    union = mask.any(0)
    (places,) = jnp.nonzero(union, size=room, fill_value=0)
    wanted = union.sum()
    own = mask[:, places] & (jnp.arange(room) < wanted)[None]
    if room >= min(tokens * count, spec.groups - common):
        return fetched(places, own)

    def whole() -> Array:
        pre = all_products(x, state, layer, spec)
        return masked(pre, state, layer, scores, mask, spec, activation)

    return lax.cond(wanted > room, whole, lambda: fetched(places, own))


def dense_ffn(
    x: Array, state: FFNState, layer: Array | int, *, spec: FFNSpec, activation: Activation
) -> Array:
    """The block as the model has it, without any top k, for x: [tokens, d_in]."""
    pre = all_products(x, state, layer, spec)
    return all_down(activation(pre, vectors_of(state, layer)), state, layer, spec)


def exact_ffn(
    x: Array, state: FFNState, layer: Array | int, *, spec: FFNSpec, activation: Activation
) -> Array:
    """The block on its true top k groups, in dense arithmetic, for x: [tokens, d_in].

    Differentiable: which groups are kept counts as constant.
    """
    h = activation(all_products(x, state, layer, spec), vectors_of(state, layer))
    return all_down(top_groups(h, norms_of(state, layer), spec), state, layer, spec)


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
    scores, rank = guess(x, state, layer, spec=spec, activation=activation, predictor=predictor)
    mask = best_mask(rank, spec.candidate_groups - spec.common_groups, spec)
    pre = all_products(x, state, layer, spec)
    return masked(pre, state, layer, scores, mask, spec, activation)


def guess(
    x: Array,
    state: FFNState,
    layer: Array | int,
    *,
    spec: FFNSpec,
    activation: Activation,
    predictor: Predictor,
) -> tuple[Array, Array]:
    """Predicted products [tokens, spec.scored_rows], and what they rank: [tokens, G - common]."""

    projections = spec.projections

    def in_order(scores: Array) -> Array:
        """From part by part to projection by projection."""
        tokens, n = scores.shape
        split = scores.reshape(tokens, spec.parts, projections, n // (spec.parts * projections))
        return jnp.swapaxes(split, 1, 2).reshape(scores.shape)

    def choose(scores: Array, count: int) -> Array:
        """The rows of the best groups, about `count` of them, i32[tokens, ...]."""
        rank = guessed_importance(in_order(scores), state, layer, spec, activation)
        groups = rank.shape[1] // spec.parts
        many = min(groups, -(-count // (projections * spec.group * spec.parts)))
        best = part_top_k(rank, many * spec.parts, spec.parts)[1]
        first = (best // groups * projections + jnp.arange(projections)[:, None, None]) * groups
        rows = (first + best % groups)[..., None] * spec.group + jnp.arange(spec.group)
        return jnp.moveaxis(rows, 0, 1).reshape(best.shape[0], -1)

    scores = lax.stop_gradient(predictor.score(state.predictor, x, layer, choose))
    scores = in_order(scores)
    return scores, guessed_importance(scores, state, layer, spec, activation)


def _fetched(
    x: Array,
    state: FFNState,
    layer: Array | int,
    scores: Array,
    places: Array,
    own: Array | None,
    *,
    spec: FFNSpec,
    activation: Activation,
) -> Array:
    """The block on groups that are fetched.

    Args:
      scores: predicted products.
      places: i32[U], numbers of groups behind the common ones.
      own: bool[tokens, U], whose candidates they are; None if there is one token, and all are its.
    """
    tokens, common = x.shape[0], spec.common_groups
    groups = jnp.concatenate([jnp.arange(common, dtype=places.dtype), places + common])
    if own is not None:
        own = with_common(own, spec)
    pre = fetched_products(x, state, layer, groups, spec)
    vectors = tuple(fetch(vector, layer, groups).reshape(-1) for vector in state.vectors)
    norms = None if state.norms is None else fetch(state.norms, layer, groups).reshape(-1)
    if spec.selects:
        h = _selected(pre, scores, groups, own, state, layer, spec, activation)
    else:
        h = activation(pre, vectors)
    rank = importance(h, norms, spec)
    h = h.reshape(tokens, -1, spec.group)
    if own is not None:
        rank, h = jnp.where(own, rank, -1.0), jnp.where(own[:, :, None], h, jnp.zeros_like(h))
    if tokens == 1 and (own is None or spec.parts == 1):
        best = part_top_k(rank, spec.k_groups, spec.parts)[1]
        kept, h = groups[best[0]], h[:, best[0]]
    else:
        mask = _best_fetched(rank, groups, own, spec)
        h, kept = jnp.where(mask[:, :, None], h, jnp.zeros_like(h)), groups
        if tokens * spec.k_groups < groups.size:
            (some,) = jnp.nonzero(mask.any(0), size=tokens * spec.k_groups, fill_value=0)
            valid = jnp.arange(some.size) < mask.any(0).sum()
            h, kept = jnp.where(valid[:, None], h[:, some], jnp.zeros_like(h[:, some])), kept[some]
    return fetched_down(h, state, layer, kept, spec)


def _best_fetched(rank: Array, groups: Array, own: Array | None, spec: FFNSpec) -> Array:
    """bool[tokens, U]: of the groups that were fetched, each token's k_groups of greatest rank."""
    if spec.parts == 1 or own is None:
        return marked(part_top_k(rank, spec.k_groups, spec.parts)[1], rank.shape[1])
    nobodys = jnp.where(own.any(0), groups, spec.groups)
    full = (
        jnp.full((rank.shape[0], spec.groups), -1.0, rank.dtype)
        .at[:, nobodys]
        .set(rank, mode="drop")
    )
    kept = marked(part_top_k(full, spec.k_groups, spec.parts)[1], spec.groups)
    return kept[:, groups] & own


def masked(
    pre: tuple[Array, ...],
    state: FFNState,
    layer: Array | int,
    scores: Array,
    mask: Array,
    spec: FFNSpec,
    activation: Activation,
) -> Array:
    """`_fetched` in dense arithmetic.

    Args:
      pre: the products of all neurons, [tokens, f] for each projection.
      scores: those that were predicted.
      mask: bool[tokens, G - common], each token's candidates.
    """
    own = with_common(mask, spec)
    if spec.selects:
        neurons = jnp.repeat(own, spec.group, axis=1)
        guesses = jnp.split(scores.astype(spec.up_dtype), spec.projections, axis=1)
        pre = tuple(
            jnp.where(neurons, exact, guess) for exact, guess in zip(pre, guesses, strict=True)
        )
    h = activation(pre, vectors_of(state, layer))
    return all_down(top_groups(h, norms_of(state, layer), spec, own), state, layer, spec)


def _selected(
    pre: tuple[Array, ...],
    scores: Array,
    groups: Array,
    own: Array | None,
    state: FFNState,
    layer: Array | int,
    spec: FFNSpec,
    activation: Activation,
) -> Array:
    """h of the groups where the activation looks at all neurons together, [tokens, n]."""
    tokens = scores.shape[0]
    # Places that are nobody's repeat another's; beyond the end they change nothing.
    places = groups if own is None else jnp.where(own.any(0), groups, spec.groups)
    every = []
    for exact, guessed in zip(pre, jnp.split(scores, spec.projections, axis=1), strict=True):
        full = guessed.astype(spec.up_dtype).reshape(tokens, spec.groups, spec.group)
        exact = exact.reshape(tokens, -1, spec.group)
        if own is not None:
            exact = jnp.where(own[:, :, None], exact, full[:, groups])
        every.append(full.at[:, places].set(exact, mode="drop").reshape(tokens, -1))
    h = activation(tuple(every), vectors_of(state, layer))
    return h.reshape(tokens, spec.groups, spec.group)[:, groups].reshape(tokens, -1)
