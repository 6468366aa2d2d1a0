"""Numbers as integers that ascend where the numbers descend, in the order of `lax.top_k`.

That order is total: NaN, infinity, ..., 0, −0, ..., −infinity, NaN with the sign bit set. Integers
make it plain to sort by several keys, to compare, and to send values of any type in one array.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

__all__ = ["below_zero", "from_keys", "has_keys", "lowest", "to_keys"]


def has_keys(dtype: Any) -> bool:
    """Whether numbers of this type can be written so: whole bytes, and a sign bit if they are
    floating-point numbers in which NaN is not a zero's."""
    dtype = jnp.dtype(dtype)
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).bits == 8 * dtype.itemsize
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits != 8 * dtype.itemsize:
        return False
    return not dtype.name.endswith(("fnuz", "fnu"))


def to_keys(x: Array) -> Array:
    """Signed integers of the width of x's numbers, in descending order of x."""
    dtype = jnp.dtype(x.dtype)
    signed = _signed(dtype)
    if jnp.issubdtype(dtype, jnp.floating):
        return ~_flipped(lax.bitcast_convert_type(x, signed))
    if jnp.issubdtype(dtype, jnp.unsignedinteger):
        x = lax.bitcast_convert_type(x ^ jnp.asarray(1 << (8 * dtype.itemsize - 1), dtype), signed)
    return ~x


def from_keys(keys: Array, dtype: Any) -> Array:
    """The numbers of type `dtype` whose keys these are."""
    dtype = jnp.dtype(dtype)
    x = (~keys).astype(_signed(dtype))
    if jnp.issubdtype(dtype, jnp.floating):
        return lax.bitcast_convert_type(_flipped(x), dtype)
    if jnp.issubdtype(dtype, jnp.unsignedinteger):
        x = lax.bitcast_convert_type(x, dtype)
        return x ^ jnp.asarray(1 << (8 * dtype.itemsize - 1), dtype)
    return x


def lowest(dtype: Any) -> Array:
    """The last number in the order."""
    dtype = jnp.dtype(dtype)
    return from_keys(jnp.asarray(jnp.iinfo(_signed(dtype)).max, _signed(dtype)), dtype)


def below_zero(x: Array) -> Array:
    """Negative numbers in the order of x, f32 both, of whatever size its numbers are: of two
    neighbours that follow each other in f32 some become one.

    Examples:
      >>> below_zero(jnp.asarray([1e-30, 2e-30, 1e30, 2e30, -1.0])).argsort().tolist()
      [4, 0, 1, 2, 3]
    """
    # They are half as many as there are numbers, and fewer without the subnormal ones, which some
    # hardware takes for zero: so every other integer, moved to where those of such numbers are.
    greatest, least_normal = 0x7F800000, 0x00800000
    moved = (greatest >> 1) + least_normal + 1
    half = ~to_keys(x) >> 1
    return from_keys(~(jnp.maximum(half, moved - greatest) - moved), jnp.float32)


def _signed(dtype: Any) -> Any:
    return jnp.dtype(f"int{8 * dtype.itemsize}")


def _flipped(bits: Array) -> Array:
    """The magnitude's bits of negative numbers reversed; its own inverse."""
    return bits ^ ((bits >> (8 * bits.dtype.itemsize - 1)) & jnp.iinfo(bits.dtype).max)
