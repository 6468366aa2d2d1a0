"""Products with single rows of each token's own list, which may end early.

A row is copied if it lies in words of its own: in float32, or in bfloat16 in words (see
`ops.encodings.words`). Products are those of float32: a vector is three of bfloat16 that add up to
it, where rows are of bfloat16 anyway.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from hire_rewrite.ops.kernels.tpu.rows import chunked, over_chunks, padded
from hire_rewrite.ops.quantize import word_halves


@functools.partial(jax.jit, static_argnames="interpret")
def picked_products(
    x: Array, rows: Array, index: Array, ends: Array, *, interpret: bool = False
) -> Array:
    """f32[tokens, k], the products of each token with rows of its own; any behind the end.

    Args:
      x: [tokens, d].
      rows: f32[N, d], or u32[N, d/2] in words.
      index: i32[tokens, k].
      ends: i32[tokens], how many of them there are.
    """
    tokens, k = index.shape
    chunks, count = chunked(k, rows)
    terms = _terms(x, rows)

    def use(i: Array, gathered: Array, x: Any, out: Any) -> None:
        total = jnp.zeros(out.shape[1:], jnp.float32)
        for columns, numbers in _parts(gathered):
            total += _dot(x[0][:, columns], numbers, 1).sum(0, keepdims=True)
        out[0] = total

    products = over_chunks(
        use,
        padded(index, chunks * count),
        terms,
        rows,
        tokens * chunks,
        ends=ends,
        x_block=pl.BlockSpec((1, *terms.shape[1:]), lambda i, *_: (lax.div(i, chunks), 0, 0)),
        out_block=pl.BlockSpec((1, 1, count), lambda i, *_: (i, 0, 0)),
        shape=(tokens * chunks, 1, count),
        name="hire_picked_products",
        interpret=interpret,
    )
    return products.reshape(tokens, -1)[:, :k]


@functools.partial(jax.jit, static_argnames="interpret")
def picked_sum(
    h: Array, rows: Array, index: Array, ends: Array, *, interpret: bool = False
) -> Array:
    """f32[tokens, d], of each token the sum of rows[index] with the weights h.

    Args:
      h: [tokens, k].
      rows, index, ends: as in `picked_products`.
    """
    tokens, k = index.shape
    chunks, count = chunked(k, rows)
    d = rows.shape[1] * (2 if rows.dtype == jnp.uint32 else 1)
    there = lax.broadcasted_iota(jnp.int32, h.shape, 1) < ends[:, None]
    terms = _terms(jnp.where(there, h, jnp.zeros_like(h)), rows)
    terms = jnp.pad(terms, ((0, 0), (0, 0), (0, chunks * count - k)))
    terms = jnp.moveaxis(terms.reshape(tokens, -1, chunks, count), 2, 1)
    terms = terms.reshape(tokens * chunks, -1, count)

    def use(i: Array, gathered: Array, h: Any, out: Any) -> None:
        @pl.when(lax.rem(i, chunks) == 0)
        def _() -> None:
            out[...] = jnp.zeros_like(out)

        for columns, numbers in _parts(gathered):
            out[0, :, columns] += _dot(h[0], numbers, 0).sum(0, keepdims=True)

    sums = over_chunks(
        use,
        padded(index, chunks * count),
        terms,
        rows,
        tokens * chunks,
        ends=ends,
        x_block=pl.BlockSpec((1, *terms.shape[1:]), lambda i, *_: (i, 0, 0)),
        out_block=pl.BlockSpec((1, 1, d), lambda i, *_: (lax.div(i, chunks), 0, 0)),
        shape=(tokens, 1, d),
        name="hire_picked_sum",
        interpret=interpret,
    )
    return sums[:, 0]


def _parts(gathered: Array) -> Iterator[tuple[slice, Array]]:
    """Columns of rows, and their numbers: f32[count, d] at once, or both halves of words."""
    width = gathered.shape[1]
    if gathered.dtype == jnp.float32:
        yield slice(0, width), gathered
        return
    for half, numbers in enumerate(word_halves(gathered)):
        yield slice(half * width, (half + 1) * width), numbers.astype(jnp.bfloat16)


def _terms(vectors: Array, rows: Array) -> Array:
    """[tokens, n, d], vectors [tokens, d] as sums of n: f32 for rows in float32, otherwise bf16."""
    if rows.dtype == jnp.float32:
        return vectors.astype(jnp.float32)[:, None]
    if vectors.dtype == jnp.bfloat16:
        return vectors[:, None]
    terms, rest = [], vectors.astype(jnp.float32)
    for _ in range(3):
        # The first 8 digits, by their bits: XLA takes a rounding away that is undone again.
        bits = lax.bitcast_convert_type(rest, jnp.uint32) & jnp.uint32(0xFFFF0000)
        finite = jnp.isfinite(rest)
        term = jnp.where(finite, lax.bitcast_convert_type(bits, jnp.float32), rest)
        terms.append(term.astype(jnp.bfloat16))
        rest = jnp.where(finite, rest - term, 0.0)
    return jnp.stack(terms, axis=1)


def _dot(x: Array, rows: Array, axis: int) -> Array:
    """f32[n, ...], x: [n, m] times rows over their axis of m."""
    exact = rows.dtype == jnp.float32
    return lax.dot_general(
        x,
        rows,
        (((1,), (axis,)), ((), ())),
        precision=lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )
