"""Products with some rows of a matrix in an encoding: each token's own."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from hire_rewrite.ops.encodings.product import Matrix, widened
from hire_rewrite.ops.encodings.protocol import Encoding, PickedEncoding, Stored
from hire_rewrite.ops.gather import gather_rows, token_products
from hire_rewrite.ops.kernels import KernelOperation

__all__ = ["picked_block_products", "picked_block_sums", "picked_products", "picked_sums"]


def picked_products(
    encoding: Encoding, x: Array, stored: Stored, layer: Array | int, picked: Array
) -> Array:
    """The products of each token with rows of its own.

    Args:
      x: [tokens, d].
      stored: the arrays of the encoding, with a leading axis of layers.
      picked: i32[tokens, k], numbers of rows.

    Returns:
      f32[tokens, k].

    Examples:
      >>> from hire_rewrite.ops.encodings import Float
      >>> stored = {"rows": jnp.array([[[1.0, 2], [3, 4], [5, 6]]])}
      >>> x, picked = jnp.ones((1, 2)), jnp.array([[2, 0]])
      >>> picked_products(Float("float32"), x, stored, 0, picked).tolist()
      [[11.0, 3.0]]
    """
    if isinstance(encoding, PickedEncoding):
        return encoding.picked_products(x, stored, layer, picked)
    return token_products(encoding.decode_rows(stored, layer, picked), x.astype(jnp.float32), 2)


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
    every = (encoding.decode_rows(stored, layer, picked) for stored in several)
    return [_sum(onto, h, rows) for onto, rows in zip(ontos, every, strict=True)]


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
    rows = _decoded(matrix, layer, picked, bits)
    return token_products(rows, x.astype(jnp.float32), 2)


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
    return tuple(_sum(onto, h, rows) for onto, rows in zip(ontos, every, strict=True))


def _sum(onto: Array, h: Array, rows: Array) -> Array:
    """f32[tokens, d], onto and rows f32[tokens, k, d] times h: [tokens, k]."""
    return onto + token_products(rows, h.astype(jnp.float32), 1)


def _decoded(matrix: Matrix, layer: Array | int, picked: Array, bits: int) -> Array:
    """f32[tokens, k, d]."""
    arrays = (gather_rows(array, layer, picked) for array in matrix if array is not None)
    return widened(*arrays, bits=bits)
