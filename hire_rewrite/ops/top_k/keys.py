"""Numbers as integers that ascend where the numbers descend, in the order of `lax.top_k`.

That order is total: NaN, infinity, ..., 0, −0, ..., −infinity, NaN with the sign bit set. Integers
make it plain to sort by several keys, to compare, and to send values of any type in one array.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

__all__ = ["from_keys", "has_keys", "lowest", "to_keys"]


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


def _signed(dtype: Any) -> Any:
    return jnp.dtype(f"int{8 * dtype.itemsize}")


def _flipped(bits: Array) -> Array:
    """The magnitude's bits of negative numbers reversed; its own inverse."""
    return bits ^ ((bits >> (8 * bits.dtype.itemsize - 1)) & jnp.iinfo(bits.dtype).max)
