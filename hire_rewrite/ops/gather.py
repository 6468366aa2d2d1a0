"""Products with rows that are gathered by number from stacked weights.

Stacked rows are [L, G, ..., d]: L layers of G groups of rows that lie together. One flat index of
layer and group is gathered by, because slicing the layer first would copy it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from hire_rewrite import _compat
from hire_rewrite.ops.kernels import KernelOperation

__all__ = [
    "by_tokens",
    "flattened",
    "gather_rows",
    "gathered_matmul",
    "gathered_sum",
    "token_products",
]

_PIECE = 1 << 22
"""Bytes of rows that are gathered at a time on CPU. A large copy is slow there, because its memory
is new at every call: 50 MB took 33 ms, and 6 ms in pieces of 2 to 8 MB with the product."""


@KernelOperation
def gathered_matmul(
    x: Array,
    stacked: Array,
    layer: Array | int,
    groups: Array,
    *,
    compute_dtype: Any,
    out_dtype: Any,
    precision: Any,
) -> Array:
    """x @ stacked[layer, groups].T, with m rows in a group.

    Args:
      x: [tokens, d].
      stacked: [L, G, ..., d].
      layer: i32[].
      groups: i32[n], for all tokens, or i32[tokens, n], for each its own.
      compute_dtype: to which rows are cast after they were gathered.
      out_dtype, precision: as in `lax.dot_general`.

    Returns:
      out_dtype[tokens, n · m].
    """
    tokens, d = x.shape
    settings: dict[str, Any] = {"precision": precision, "preferred_element_type": out_dtype}
    if groups.ndim == 2:
        rows = gather_rows(stacked, layer, groups).astype(compute_dtype)
        rows = rows.reshape(tokens, groups.shape[1] * math.prod(stacked.shape[2:-1]), d)
        return lax.dot_general(rows, x, (((2,), (1,)), ((0,), (0,))), **settings)

    def times(x: Array, stacked: Array, layer: Array, groups: Array) -> Array:
        # Plain matrices: an einsum over the groups was 19 times slower on CPU.
        rows = gather_rows(stacked, layer, groups).astype(compute_dtype).reshape(-1, d)
        return lax.dot_general(x, rows, (((1,), (1,)), ((), ())), **settings)

    def in_pieces(x: Array, stacked: Array, layer: Array, groups: Array) -> Array:
        pieces = _pieces(groups, stacked)
        products = lax.map(lambda piece: times(x, stacked, layer, piece), pieces)
        count = groups.size * math.prod(stacked.shape[2:-1])
        return jnp.moveaxis(products, 0, 1).reshape(tokens, -1)[:, :count]

    return _on_cpu(in_pieces, times, stacked, x, stacked, jnp.asarray(layer, jnp.int32), groups)


@KernelOperation
def gathered_sum(
    h: Array, stacked: Array, layer: Array | int, groups: Array, *, out_dtype: Any, precision: Any
) -> Array:
    """The sum of the rows stacked[layer, groups] with the weights h.

    Args:
      h: [tokens, n, m]; rows are cast to its dtype after they were gathered.
      stacked: [L, G, m, d].
      layer: i32[].
      groups: i32[n].
      out_dtype, precision: as in `lax.dot_general`.

    Returns:
      out_dtype[tokens, d].
    """
    tokens, d = h.shape[0], stacked.shape[-1]

    def times(h: Array, stacked: Array, layer: Array, groups: Array, dtype: Any = out_dtype) -> Any:
        rows = gather_rows(stacked, layer, groups).astype(h.dtype).reshape(-1, d)
        return lax.dot_general(
            h.reshape(tokens, rows.shape[0]),
            rows,
            (((1,), (0,)), ((), ())),
            precision=precision,
            preferred_element_type=dtype,
        )

    def in_pieces(h: Array, stacked: Array, layer: Array, groups: Array) -> Array:
        pieces = _pieces(groups, stacked)
        padded = jnp.pad(h, ((0, 0), (0, pieces.size - groups.size), (0, 0)))
        split = jnp.moveaxis(padded.reshape(tokens, *pieces.shape, h.shape[2]), 1, 0)
        wide = jnp.promote_types(out_dtype, jnp.float32)

        def add(total: Array, piece: tuple[Array, Array]) -> tuple[Array, None]:
            weights, some = piece
            return total + times(weights, stacked, layer, some, wide), None

        axes = _compat.varying_axes((h, stacked, layer, groups))
        empty = _compat.varying_over(jnp.zeros((tokens, d), wide), axes)
        total, _ = lax.scan(add, empty, (split, pieces))
        return total.astype(out_dtype)

    return _on_cpu(in_pieces, times, stacked, h, stacked, jnp.asarray(layer, jnp.int32), groups)


def gather_rows(stacked: Array, layer: Array | int, groups: Array) -> Array:
    """stacked[layer, groups]: [*groups.shape, ...] of stacked: [L, G, ...]."""
    flat = stacked.reshape(-1, *stacked.shape[2:])
    return flat.at[_flat_index(stacked, layer, groups)].get(mode="promise_in_bounds")


def token_products(rows: Array, vectors: Array, axis: int) -> Array:
    """The products of rows f32[tokens, n, d], of which each token has its own, with vectors.

    Args:
      vectors: f32[tokens, m], with m the size of `axis` of the rows, over which is summed: 1 or 2.
    """
    return lax.dot_general(
        rows,
        vectors,
        (((axis,), (1,)), ((0,), (0,))),
        precision=lax.Precision.HIGHEST,  # few rows, which are to be exact
        preferred_element_type=jnp.float32,
    )


def by_tokens(function: Callable[..., Any], arrays: Sequence[Array], batch: int) -> Any:
    """`function` of arrays [tokens, ...], so many tokens at a time: their rows fill memory.

    Args:
      function: from arrays of some tokens to a pytree of such arrays.
    """
    tokens = arrays[0].shape[0]
    if not isinstance(tokens, int):  # a symbol: one at a time
        single = functools.partial(jax.tree.map, lambda leaf: leaf[0])
        return lax.map(lambda token: single(function(*(array[None] for array in token))), arrays)
    if tokens <= batch:
        return function(*arrays)
    chunks = -(-tokens // batch)
    step = -(-tokens // chunks)

    def split(array: Array) -> Array:
        missing = (chunks * step - tokens, *array.shape[1:])
        whole = jnp.concatenate([array, jnp.zeros(missing, array.dtype)])
        return whole.reshape(chunks, step, *array.shape[1:])

    results = lax.map(lambda chunk: function(*chunk), tuple(map(split, arrays)))
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:tokens], results)


def flattened(stacked: Array, layer: Array | int, groups: Array) -> tuple[Array, Array]:
    """What kernels gather stacked[layer, groups] by, for stacked: [L, G, ..., d].

    Returns:
      The rows of all layers' groups, [L · G, m, d], and which of them the groups are.
    """
    layers, count, *_, d = stacked.shape
    index = _flat_index(stacked, layer, groups).astype(jnp.int32)
    return stacked.reshape(layers * count, -1, d), index


def _flat_index(stacked: Array, layer: Array | int, groups: Array) -> Array:
    return groups + jnp.asarray(layer, groups.dtype) * stacked.shape[1]


def _on_cpu(
    in_pieces: Callable[..., Array], whole: Callable[..., Array], stacked: Array, *operands: Array
) -> Array:
    """One of two forms: on CPU rows are gathered in pieces where they are many."""
    if operands[-1].size <= _per_piece(stacked):
        return whole(*operands)
    return lax.platform_dependent(*operands, cpu=in_pieces, default=whole)


def _pieces(groups: Array, stacked: Array) -> Array:
    """i32[pieces, n], the groups; the last piece may be filled up."""
    step = _per_piece(stacked)
    return jnp.pad(groups, (0, -groups.size % step)).reshape(-1, step)


def _per_piece(stacked: Array) -> int:
    """Groups of stacked: [L, G, ...] that are gathered at a time."""
    size = math.prod(stacked.shape[2:]) * max(stacked.dtype.itemsize, 4)
    return max(1, _PIECE // size)
