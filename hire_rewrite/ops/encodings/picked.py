"""Products with some rows of a matrix in an encoding: each token's own.

Each token has a list of k rows' numbers. A list may end early: from its first negative number on
all are negative, and these rows are not read.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from hire_rewrite.ops.encodings.product import Matrix, taken, widened
from hire_rewrite.ops.encodings.protocol import Encoding, PickedEncoding, Stored
from hire_rewrite.ops.gather import gather_rows, token_products
from hire_rewrite.ops.kernels import KernelOperation
from hire_rewrite.ops.quantize import unpack_words

__all__ = [
    "picked_block_products",
    "picked_block_sums",
    "picked_float_products",
    "picked_float_sum",
    "picked_products",
    "picked_sums",
]


def picked_products(
    encoding: Encoding, x: Array, stored: Stored, layer: Array | int, picked: Array
) -> Array:
    """The products of each token with rows of its own.

    Args:
      x: [tokens, d].
      stored: the arrays of the encoding, with a leading axis of layers.
      picked: i32[tokens, k], numbers of rows.

    Returns:
      f32[tokens, k]; zero behind the end of a list.

    Examples:
      >>> from hire_rewrite.ops.encodings import Float
      >>> stored = {"rows": jnp.array([[[1.0, 2], [3, 4], [5, 6]]])}
      >>> x, picked = jnp.ones((1, 2)), jnp.array([[2, 0]])
      >>> picked_products(Float("float32"), x, stored, 0, picked).tolist()
      [[11.0, 3.0]]
    """
    if isinstance(encoding, PickedEncoding):
        return encoding.picked_products(x, stored, layer, picked)
    rows = encoding.decode_rows(stored, layer, jnp.maximum(picked, 0))
    return _products(x, rows, picked)


def picked_sums(
    encoding: Encoding,
    ontos: Sequence[Array],
    h: Array,
    several: Sequence[Stored],
    layer: Array | int,
    picked: Array,
) -> list[Array]:
    """onto + Σᵢ hᵢ rows[pickedᵢ] of each token, for the same rows' numbers of several matrices.

    Args:
      ontos: f32[tokens, d] for each matrix.
      h: [tokens, k].
      several: of each matrix what is stored, as in `picked_products`.
      picked: as there.

    Returns:
      f32[tokens, d] for each matrix.

    Examples:
      >>> from hire_rewrite.ops.encodings import Float
      >>> stored = {"rows": jnp.array([[[1.0, 2], [3, 4], [5, 6]]])}
      >>> h, picked = jnp.array([[1.0, 10]]), jnp.array([[2, 0]])
      >>> (y,) = picked_sums(Float("float32"), [jnp.ones((1, 2))], h, [stored], 0, picked)
      >>> y.tolist()
      [[16.0, 27.0]]
    """
    if isinstance(encoding, PickedEncoding):
        return list(encoding.picked_sums(ontos, h, several, layer, picked))
    every = (encoding.decode_rows(stored, layer, jnp.maximum(picked, 0)) for stored in several)
    return [_sum(onto, h, rows, picked) for onto, rows in zip(ontos, every, strict=True)]


@KernelOperation
def picked_block_products(
    x: Array,
    matrix: Matrix,
    layer: Array | int,
    picked: Array,
    *,
    bits: int,
) -> Array:
    """`picked_products` of rows in blocks (see `block_product`); f32[tokens, k]."""
    return _products(x, _decoded(matrix, layer, picked, bits), picked)


@KernelOperation
def picked_block_sums(
    ontos: Sequence[Array],
    h: Array,
    several: Sequence[Matrix],
    layer: Array | int,
    picked: Array,
    *,
    bits: int,
) -> tuple[Array, ...]:
    """`picked_sums` of rows in blocks (see `block_product`)."""
    every = (_decoded(matrix, layer, picked, bits) for matrix in several)
    return tuple(_sum(onto, h, rows, picked) for onto, rows in zip(ontos, every, strict=True))


@KernelOperation
def picked_float_products(x: Array, stacked: Array, layer: Array | int, picked: Array) -> Array:
    """`picked_products` of floating-point rows; f32[tokens, k].

    Args:
      stacked: [L, n, d] in floating point, or u32[L, n, d/2] (see `quantize.pack_words`).
    """
    return _products(x, _gathered(stacked, layer, picked), picked)


@KernelOperation
def picked_float_sum(
    onto: Array, h: Array, stacked: Array, layer: Array | int, picked: Array
) -> Array:
    """`picked_sums` of one matrix, whose rows are as in `picked_float_products`; f32[tokens, d]."""
    return _sum(onto, h, _gathered(stacked, layer, picked), picked)


def _gathered(stacked: Array, layer: Array | int, picked: Array) -> Array:
    """[tokens, k, d], floating-point rows, of which any stand behind the end of a list."""
    rows = gather_rows(stacked, layer, jnp.maximum(picked, 0))
    return unpack_words(rows) if rows.dtype == jnp.uint32 else rows


def _products(x: Array, rows: Array, picked: Array) -> Array:
    """f32[tokens, k], x: [tokens, d] times rows [tokens, k, d]."""
    products = token_products(rows.astype(jnp.float32), x.astype(jnp.float32), 2)
    return jnp.where(picked < 0, 0.0, products)


def _sum(onto: Array, h: Array, rows: Array, picked: Array) -> Array:
    """f32[tokens, d], onto and rows [tokens, k, d] times h: [tokens, k]."""
    h = jnp.where(picked < 0, 0.0, h.astype(jnp.float32))
    return onto + token_products(rows.astype(jnp.float32), h, 1)


def _decoded(matrix: Matrix, layer: Array | int, picked: Array, bits: int) -> Array:
    """f32[tokens, k, d]."""
    rows = jnp.maximum(picked, 0)
    arrays = taken(matrix, lambda array: gather_rows(array, layer, rows))
    return widened(*arrays, bits=bits)
