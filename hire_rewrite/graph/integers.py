"""Integers as numbers: between which they lie, and where their width makes no difference.

`jax_enable_x64` decides how wide an index is, and JAX casts indices. A cast that keeps every number
makes no other weight; one that does not (299 in 8 bits is 43) does, and so does arithmetic that
wraps around in one width and not in another.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import primitives as p

Bounds = tuple[int, int]
"""The least and the greatest number that an integer can be."""

MOVES = frozenset({p.broadcast_in_dim_p, p.reshape_p, p.squeeze_p, p.concatenate_p})
"""What lays out indices for a gather."""

READS_NUMBERS = MOVES | {
    p.lt_p, p.le_p, p.gt_p, p.ge_p, p.eq_p, p.ne_p,
    p.select_n_p, p.convert_element_type_p, p.dynamic_slice_p, p.gather_p,
    p.argmax_p, p.argmin_p,
}  # fmt: skip
"""Operations whose result follows from the numbers of integers, whatever their width."""


def is_integer(aval: Any) -> bool:
    """Whether a value of this type is an integer, or an array of some."""
    dtype = getattr(aval, "dtype", None)
    return dtype is not None and bool(jnp.issubdtype(dtype, jnp.integer))


def range_of(dtype: Any) -> Bounds:
    """All that an integer type holds.

    Examples:
      >>> range_of("uint8")
      (0, 255)
    """
    info = jnp.iinfo(dtype)
    return int(info.min), int(info.max)


def holds(dtype: Any, bounds: Bounds) -> bool:
    """Whether an integer type holds all numbers in the bounds.

    Examples:
      >>> holds("int8", (0, 127)), holds("uint32", (-1, 2))
      (True, False)
    """
    low, high = range_of(dtype)
    return low <= bounds[0] and bounds[1] <= high


def positions(primitive: Any, params: Mapping[str, Any], shape: Sequence[int]) -> Bounds | None:
    """Bounds of what an operation returns if it returns positions along an axis.

    Args:
      shape: of its operand, if it has one.
    """
    if primitive is p.iota_p:
        size = params["shape"][params["dimension"]]
    elif primitive in (p.argmax_p, p.argmin_p):
        size = shape[params["axes"][0]]
    else:
        return None
    return (0, max(0, size - 1)) if isinstance(size, int) else None


def result_bounds(primitive: Any, ins: Sequence[Bounds]) -> Bounds | None:
    """Bounds of what exact arithmetic makes of integers; None if that is not known.

    Examples:
      >>> result_bounds(p.add_p, [(0, 2), (3, 3)])
      (3, 5)
    """
    if primitive is p.sign_p:
        return -1, 1
    if primitive in (p.div_p, p.rem_p) and ins[1][0] <= 0 <= ins[1][1]:
        return None
    if primitive is p.rem_p:
        most = max(map(abs, ins[1])) - 1
        return max(-most, min(0, ins[0][0])), min(most, max(0, ins[0][1]))
    if primitive is p.clamp_p:
        return min(low for low, _ in ins), max(high for _, high in ins)
    if primitive is p.abs_p:
        low, high = sorted(map(abs, ins[0]))
        return (0 if ins[0][0] <= 0 <= ins[0][1] else low), high
    if primitive in _AT_CORNERS:
        corners = [_AT_CORNERS[primitive](*corner) for corner in itertools.product(*ins)]
        return min(corners), max(corners)
    if primitive in _BITS and all(low >= 0 for low, _ in ins):
        return _of_bits(primitive, *ins)
    return None


def _of_bits(primitive: Any, one: Bounds, other: Bounds) -> Bounds:
    """`result_bounds` of an operation on the bits of two numbers that are not negative."""
    if primitive is p.and_p:
        return 0, min(one[1], other[1])
    if primitive in (p.or_p, p.xor_p):
        return 0, (1 << max(one[1], other[1]).bit_length()) - 1
    return one[0] >> min(other[1], _WIDEST), one[1] >> min(other[0], _WIDEST)


def _quotient(a: int, b: int) -> int:
    """Rounded towards zero, as XLA's."""
    return a // b if (a < 0) == (b < 0) else -(-a // b)


_BITS = frozenset({p.and_p, p.or_p, p.xor_p, p.shift_right_logical_p, p.shift_right_arithmetic_p})
_WIDEST = 64
"""Bits of the widest integers."""

_AT_CORNERS: dict[Any, Callable[..., int]] = {
    p.add_p: lambda a, b: a + b,
    p.sub_p: lambda a, b: a - b,
    p.mul_p: lambda a, b: a * b,
    p.neg_p: lambda a: -a,
    p.max_p: max,
    p.min_p: min,
    p.div_p: _quotient,
}
"""Arithmetic whose extremes are at the bounds of its operands."""
