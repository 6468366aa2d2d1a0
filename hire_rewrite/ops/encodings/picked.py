"""Products with some rows of a matrix in an encoding: each token's own."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from hire_rewrite.ops.encodings.product import Matrix, widened
from hire_rewrite.ops.encodings.protocol import Encoding, PickedEncoding, Stored
from hire_rewrite.ops.gather import gather_rows, token_products
from hire_rewrite.ops.kernels import KernelOperation

__all__ = ["picked_block_products", "picked_block_sum", "picked_products", "picked_sum"]


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

    Example:
      >>> from hire_rewrite.ops.encodings import Float
      >>> stored = {"rows": jnp.array([[[1.0, 2], [3, 4], [5, 6]]])}
      >>> x, picked = jnp.ones((1, 2)), jnp.array([[2, 0]])
      >>> picked_products(Float("float32"), x, stored, 0, picked).tolist()
      [[11.0, 3.0]]
    """
    if isinstance(encoding, PickedEncoding):
        return encoding.picked_products(x, stored, layer, picked)
    return token_products(encoding.decode_rows(stored, layer, picked), x.astype(jnp.float32), 2)


def picked_sum(
    encoding: Encoding, onto: Array, h: Array, stored: Stored, layer: Array | int, picked: Array
) -> Array:
    """onto + Σᵢ hᵢ rows[pickedᵢ], of each token.

    Args:
      onto: f32[tokens, d].
      h: [tokens, k].
      stored, picked: as in `picked_products`.

    Returns:
      f32[tokens, d].

    Example:
      >>> from hire_rewrite.ops.encodings import Float
      >>> stored = {"rows": jnp.array([[[1.0, 2], [3, 4], [5, 6]]])}
      >>> h, picked = jnp.array([[1.0, 10]]), jnp.array([[2, 0]])
      >>> picked_sum(Float("float32"), jnp.ones((1, 2)), h, stored, 0, picked).tolist()
      [[16.0, 27.0]]
    """
    if isinstance(encoding, PickedEncoding):
        return encoding.picked_sum(onto, h, stored, layer, picked)
    rows = encoding.decode_rows(stored, layer, picked)
    return onto + token_products(rows, h.astype(jnp.float32), 1)


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
def picked_block_sum(
    onto: Array,
    h: Array,
    matrix: Matrix,
    layer: Array | int,
    picked: Array,
    *,
    bits: int,
) -> Array:
    """`picked_sum` of rows in blocks (see `block_product`); f32[tokens, d]."""
    rows = _decoded(matrix, layer, picked, bits)
    return onto + token_products(rows, h.astype(jnp.float32), 1)


def _decoded(matrix: Matrix, layer: Array | int, picked: Array, bits: int) -> Array:
    """f32[tokens, k, d]."""
    arrays = (gather_rows(array, layer, picked) for array in matrix if array is not None)
    return widened(*arrays, bits=bits)
