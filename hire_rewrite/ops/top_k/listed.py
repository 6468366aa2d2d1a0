"""Where a mask is true: of each token a list, without a sort."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from hire_rewrite.ops.kernels import KernelOperation

__all__ = ["listed"]


@KernelOperation
def listed(mask: Array, *, k: int) -> tuple[Array, Array]:
    """Of each token the first k places where a mask is true.

    Args:
      mask: bool[tokens, n].
      k: at most n.

    Returns:
      places: i32[tokens, k], ascending, and −1 behind the last.
      counts: i32[tokens], in how many places it is true, which may be more than k.

    Examples:
      >>> places, counts = listed(jnp.array([[True, False, True], [False, False, True]]), k=2)
      >>> places.tolist(), counts.tolist()
      ([[0, 2], [2, -1]], [2, 1])
    """
    numbers = lax.broadcasted_iota(jnp.int32, mask.shape, 1)
    order = jnp.cumsum(mask, axis=1, dtype=jnp.int32)
    token = lax.broadcasted_iota(jnp.int32, mask.shape, 0)
    empty = jnp.full((mask.shape[0], k), -1, jnp.int32)
    # What is not true goes behind the end, where it is dropped.
    places = empty.at[token, jnp.where(mask, order - 1, k)].set(numbers, mode="drop")
    return places, mask.sum(1, dtype=jnp.int32)
