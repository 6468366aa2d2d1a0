"""Integers as numbers: between which they lie, and where their width makes no difference.

`jax_enable_x64` decides how wide an index is, and JAX casts indices. A cast that keeps every number
makes no other weight; one that does not (299 in 8 bits is 43) does, and so does arithmetic that
wraps around in one width and not in another.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
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
    if primitive not in _MONOTONE:
        return None
    corners = [_MONOTONE[primitive](*corner) for corner in itertools.product(*ins)]
    return min(corners), max(corners)


def _quotient(a: int, b: int) -> int:
    """Rounded towards zero, as XLA's."""
    return a // b if (a < 0) == (b < 0) else -(-a // b)


_MONOTONE: dict[Any, Callable[..., int]] = {
    p.add_p: lambda a, b: a + b,
    p.sub_p: lambda a, b: a - b,
    p.mul_p: lambda a, b: a * b,
    p.neg_p: lambda a: -a,
    p.max_p: max,
    p.min_p: min,
    p.div_p: _quotient,
}
"""Arithmetic whose extremes are at the bounds of its operands."""
