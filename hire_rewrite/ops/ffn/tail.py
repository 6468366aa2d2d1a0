"""The feed-forward block of any model: guessed from a compressed copy, its top k neurons exactly.

A model that was not trained with a top-k needs all of its neurons, but few of them exactly. So the
whole block is computed from a compressed copy of all its layers; what the copy takes for the k
greatest neurons is computed anew from rows as the model has them, and takes the place of the guess:

    y = Σ over the top k of hᵢ wᵢ + Σ over the others of ĥᵢ ŵᵢ

with ĥ and ŵ from the copy, h and w exact. `dense_predicted_ffn` is what this approximates.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from hire_rewrite.ops.ffn.block import Activation
from hire_rewrite.ops.ffn.guessed import (
    GuessedLayer,
    PredictedFFNSpec,
    PredictedFFNState,
    members,
)
from hire_rewrite.ops.quality import Choice, Comparison, Measured
from hire_rewrite.ops.top_k.select import marked, set_apart, top_k
from hire_rewrite.ops.usage import Usage

__all__ = [
    "PredictedFFNSpec",
    "PredictedFFNState",
    "counted_predicted_ffn",
    "dense_predicted_ffn",
    "hire_predicted_ffn",
    "measured_predicted_ffn",
]


def hire_predicted_ffn(
    x: Array,
    state: PredictedFFNState,
    layer: Array | int,
    *,
    spec: PredictedFFNSpec,
    activation: Activation,
) -> Array:
    """The block, its top k groups exactly and the others as the compressed copy has them.

    Each token has a list of its own, so that its result does not depend on the tokens beside it.
    Tokens that may ask for all rows together get `dense_predicted_ffn`, which reads less.

    Args:
      x: [tokens, d_in].
      state: see `PredictedFFNState`.
      layer: i32[], the index into the leading axis of the arrays.

    Returns:
      spec.down_dtype[tokens, d_out]. NaN where x is.

    Examples:
      >>> import dataclasses, jax
      >>> from hire_rewrite.ops.encodings import Blocks, Float
      >>> up, down = jax.random.normal(jax.random.key(0), (2, 64, 32))  # a row for each neuron
      >>> def packed(encoding, rows):
      ...     return jax.tree.map(lambda array: array[None], encoding.store(rows))  # one layer
      >>> f32 = jnp.dtype("float32")
      >>> products = {"up_dtype": f32, "down_dtype": f32, "precision": None, "compute_dtype": f32}
      >>> spec = PredictedFFNSpec(
      ...     **products, width=64, group=1, projections=1, k_groups=16, criterion="output",
      ...     encoding=Blocks(4), exact=Float("float32"),
      ... )
      >>> norms = jnp.linalg.norm(down, axis=1)
      >>> copy = packed(spec.encoding, up), packed(spec.encoding, down.T)
      >>> rows = packed(spec.exact, up), packed(spec.exact, down)
      >>> state = PredictedFFNState(*copy, *rows, vectors=(), norms=norms[None])
      >>> def relu(pre, vectors):
      ...     return jax.nn.relu(pre[0])
      >>> x = jnp.ones((1, 32))
      >>> dense = jax.nn.relu(x @ up.T) @ down
      >>> def error(spec):
      ...     y = hire_predicted_ffn(x, state, 0, spec=spec, activation=relu)
      ...     return jnp.linalg.norm(y - dense)
      >>> bool(error(spec) < 0.8 * error(dataclasses.replace(spec, k_groups=0, exact=None)))
      True
    """
    return counted_predicted_ffn(x, state, layer, spec=spec, activation=activation)[0]


def counted_predicted_ffn(
    x: Array,
    state: PredictedFFNState,
    layer: Array | int,
    *,
    spec: PredictedFFNSpec,
    activation: Activation,
) -> tuple[Array, Usage]:
    """`hire_predicted_ffn`, and what it read: groups of each token."""
    tokens = x.shape[0]
    few = isinstance(tokens, int)  # otherwise a symbol
    if few and spec.takes_all(tokens):
        y = dense_predicted_ffn(x, state, layer, spec=spec, activation=activation)
        return y, Usage(whole=True)
    block = GuessedLayer(state, layer, spec, activation)
    guesses = block.guesses(x)
    if not spec.k_groups:
        return block.guessed_down(guesses).astype(spec.down_dtype), Usage()
    groups, _, others = set_apart(guesses, block.rank(guesses), k=spec.k_groups)
    neurons, guessed = members(groups, spec.group), block.guessed_down(others)
    if few:
        y = block.gathered(x, neurons, guessed).astype(spec.down_dtype)
        return y, Usage(tokens * spec.k_groups)
    chosen = marked(neurons, spec.width)
    y = (guessed + block.masked(block.hidden(x), chosen)).astype(spec.down_dtype)
    return y, Usage(whole=True)


def dense_predicted_ffn(
    x: Array,
    state: PredictedFFNState,
    layer: Array | int,
    *,
    spec: PredictedFFNSpec,
    activation: Activation,
) -> Array:
    """The block on all of its neurons in dense arithmetic, for x: [tokens, d_in], by the best rows
    that are held: as the model has them, or else the exact ones, or else the compressed copy.

    Returns:
      spec.down_dtype[tokens, d_out].
    """
    return GuessedLayer(state, layer, spec, activation).dense(x)[1]


def measured_predicted_ffn(
    x: Array,
    state: PredictedFFNState,
    layer: Array | int,
    *,
    spec: PredictedFFNSpec,
    activation: Activation,
) -> Measured:
    """Results [tokens, d_out] for x: [tokens, d_in]; the units of the choice are groups.

    The exact one is the dense one. The rewritten one is that of `hire_predicted_ffn` for any number
    of tokens that has not all rows, in dense arithmetic.
    """
    block = GuessedLayer(state, layer, spec, activation)
    (h, dense), guesses = block.dense(x), block.guesses(x)
    if not spec.k_groups:
        rewritten = block.guessed_down(guesses).astype(dense.dtype)
        return Measured(dense, rewritten, Comparison(dense, dense, rewritten))
    rank, guessed = block.rank(h), block.rank(guesses)
    groups = marked(top_k(guessed, spec.k_groups)[1], spec.groups)
    chosen = jnp.repeat(groups, spec.group, axis=1)
    others = jnp.where(chosen, jnp.zeros_like(guesses), guesses)
    if state.dense is not None:
        h = block.hidden(x)
    rewritten = (block.guessed_down(others) + block.masked(h, chosen)).astype(dense.dtype)
    choice = Choice(rank, guessed, groups, spec.k_groups, jnp.square(rank), 0.0)
    return Measured(dense, rewritten, Comparison(dense, dense, rewritten, choice))
