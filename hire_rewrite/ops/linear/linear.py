"""A linear layer from a compressed copy of its weight, the columns of the greatest inputs exactly.

What a compressed copy loses of y = W x it loses in few places: an input xⱼ that is large beside the
others carries the error of its column into every result. So the inputs of greatest |x| meet their
columns as the model has them, and the compressed product is that of the others (whose rounding, if
x is rounded, is then finer too).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from hire_rewrite.ops.encodings import Encoding, JointEncoding, Stored, picked_sums
from hire_rewrite.ops.named_types import exportable
from hire_rewrite.ops.narrow import times
from hire_rewrite.ops.top_k.select import set_apart

__all__ = [
    "LinearSpec",
    "LinearState",
    "exact_linear",
    "hire_linear",
    "hire_linears",
    "tokenwise_linear",
]


@dataclasses.dataclass(frozen=True)
class LinearSpec:
    """What is to be computed at a linear layer.

    Attributes:
      encoding: how its rows [n, d] are stored.
      k: how many inputs of a token meet their columns as `columns` stores them.
      columns: how columns, rows of [d, n], are stored; None for none, with k = 0.
      round_inputs: whether the other inputs may be rounded to 8 bits (see `Encoding.product`).
    """

    encoding: Encoding
    k: int = 0
    columns: Encoding | None = None
    round_inputs: bool = False

    def takes_all(self, tokens: int, d: int) -> bool:
        """Whether so many tokens may ask for all d columns: then these alone are read."""
        return self.columns is not None and tokens * self.k >= d

    def of_columns(self, shards: int) -> LinearSpec:
        """That of one of so many devices, each of which has as many of the inputs."""
        return dataclasses.replace(self, k=-(-self.k // shards))


@exportable
class LinearState(NamedTuple):
    """The arrays of a linear layer, with a leading axis of layers.

    Attributes:
      rows: what `LinearSpec.encoding` stores of its rows.
      columns: what `LinearSpec.columns` stores of its columns; empty without.
      dense: [L, n, d], the rows as the model has them; None where only rounded ones are held.
    """

    rows: Stored
    columns: Stored
    dense: Array | None = None


def hire_linear(x: Array, state: LinearState, layer: Array | int, *, spec: LinearSpec) -> Array:
    """f32[tokens, n], about x @ W.T for x: [tokens, d]. NaN where x is.

    Tokens that may ask for all columns together get them, which reads less than their own.

    Examples:
      >>> import jax
      >>> from hire_rewrite.ops.encodings import Blocks, Float
      >>> w, x = jax.random.normal(jax.random.key(0), (64, 32)), jnp.ones((1, 32)).at[0, 3].set(50)
      >>> def packed(encoding, rows):
      ...     return jax.tree.map(lambda array: array[None], encoding.store(rows))  # one layer
      >>> spec = LinearSpec(Blocks(4), k=1, columns=Float("float32"))
      >>> state = LinearState(packed(spec.encoding, w), packed(spec.columns, w.T))
      >>> error = abs(hire_linear(x, state, 0, spec=spec) - x @ w.T).max()
      >>> without = abs(spec.encoding.product(x, state.rows, 0) - x @ w.T).max()
      >>> bool(error < without / 3)
      True
    """
    (y,) = hire_linears(x, [state], layer, spec=spec)
    return y


def hire_linears(
    x: Array, states: Sequence[LinearState], layer: Array | int, *, spec: LinearSpec
) -> list[Array]:
    """`hire_linear` of the same x with several weights, which are read together where they can be.

    Examples:
      >>> import jax
      >>> from hire_rewrite.ops.encodings import Blocks
      >>> w, spec = jax.random.normal(jax.random.key(0), (64, 32)), LinearSpec(Blocks(4))
      >>> rows = jax.tree.map(lambda array: array[None], spec.encoding.store(w))  # one layer
      >>> q, k = hire_linears(jnp.ones((1, 32)), [LinearState(rows, {})] * 2, 0, spec=spec)
      >>> q.shape, bool((q == k).all())
      ((1, 64), True)
    """
    x = x.astype(jnp.float32)
    columns, (tokens, d) = spec.columns, x.shape
    if columns is None:
        return _products(x, states, layer, spec)
    few = isinstance(tokens, int)  # otherwise a symbol
    if few and spec.takes_all(tokens, d):
        return [_by_columns(x, state, layer, columns) for state in states]
    places, greatest, others = set_apart(x, lax.stop_gradient(jnp.abs(x)), k=spec.k)
    products = _products(others, states, layer, spec)
    if few:
        stored = [state.columns for state in states]
        return picked_sums(columns, products, greatest, stored, layer, places)
    both = zip(products, states, strict=True)
    return [y + _by_columns(x - others, state, layer, columns) for y, state in both]


def exact_linear(x: Array, state: LinearState, layer: Array | int, *, spec: LinearSpec) -> Array:
    """f32[tokens, n], x @ W.T in dense arithmetic for x: [tokens, d], with the best copy of W that
    is stored."""
    x = x.astype(jnp.float32)
    if state.dense is not None:
        rows = lax.dynamic_index_in_dim(state.dense, layer, keepdims=False).astype(jnp.float32)
    elif spec.columns is None:
        rows = spec.encoding.decode(state.rows, layer)
    else:
        return _by_columns(x, state, layer, spec.columns)
    return times(x, rows, None)


def tokenwise_linear(
    x: Array, state: LinearState, layer: Array | int, *, spec: LinearSpec
) -> Array:
    """f32[tokens, n], what `hire_linear` computes for each token in a call of its own.

    In dense arithmetic, for any number of tokens x: [tokens, d]: no token has more columns, or
    inputs that are rounded less, because there are others beside it.

    Examples:
      >>> import jax
      >>> from hire_rewrite.ops.encodings import Blocks, Float
      >>> w, x = jax.random.normal(jax.random.key(0), (2, 64, 32))
      >>> def packed(encoding, rows):
      ...     return jax.tree.map(lambda array: array[None], encoding.store(rows))  # one layer
      >>> spec = LinearSpec(Blocks(4), k=1, columns=Float("float32"))
      >>> state = LinearState(packed(spec.encoding, w), packed(spec.columns, w.T))
      >>> apart = jnp.concatenate([hire_linear(row[None], state, 0, spec=spec) for row in x])
      >>> together = hire_linear(x, state, 0, spec=spec)  # by all columns
      >>> y = tokenwise_linear(x, state, 0, spec=spec)
      >>> bool(abs(y - apart).max() < 1e-4), bool(abs(y - together).max() < 1e-4)
      (True, False)
    """
    x, columns, encoding = x.astype(jnp.float32), spec.columns, spec.encoding
    others = x
    if columns is not None:
        if spec.takes_all(1, x.shape[1]):
            return _by_columns(x, state, layer, columns)
        others = set_apart(x, lax.stop_gradient(jnp.abs(x)), k=spec.k)[2]
    if spec.round_inputs:
        y = encoding.product(others, state.rows, layer, round_inputs=True)
    else:
        y = times(others, encoding.decode(state.rows, layer), None)
    return y if columns is None else y + _by_columns(x - others, state, layer, columns)


def _by_columns(x: Array, state: LinearState, layer: Array | int, columns: Encoding) -> Array:
    """f32[tokens, n], x @ W.T by all columns."""
    return times(x, columns.decode(state.columns, layer).T, None)


def _products(
    x: Array, states: Sequence[LinearState], layer: Array | int, spec: LinearSpec
) -> list[Array]:
    tokens, encoding = x.shape[0], spec.encoding
    if not isinstance(tokens, int):
        return [times(x, encoding.decode(state.rows, layer), None) for state in states]
    if isinstance(encoding, JointEncoding):
        rows = [state.rows for state in states]
        return list(encoding.products(x, rows, layer, round_inputs=spec.round_inputs))
    return [
        encoding.product(x, state.rows, layer, round_inputs=spec.round_inputs) for state in states
    ]
