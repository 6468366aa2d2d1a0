"""How one operation changes the order of numbers along the vocabulary."""

from __future__ import annotations

from jax.extend.core import primitives as p

from hire_rewrite import _compat
from hire_rewrite.graph.nodes import Node, Value
from hire_rewrite.graph.traits import Trait, has, slope
from hire_rewrite.patterns.axes import origin, result_axis
from hire_rewrite.sites.head.along import is_above_zero, is_random, varies

UP, DOWN, LOST = 1, -1, 0
"""How values are ordered along the vocabulary: as the logits are, the other way round, or not."""

_RISING = frozenset((p.exp2_p, p.expm1_p, p.cbrt_p, p.sinh_p, p.asinh_p, p.atan_p, p.erf_p))
_RISING_ABOVE_ZERO = frozenset((p.log_p, p.log1p_p, p.sqrt_p, p.square_p))
"""Functions that rise where they are defined, but for rounding; those below are NaN below zero,
which comes before all numbers, or fall there."""

_LAYS = Trait.MOVES | Trait.KEEPS | Trait.CUTS | Trait.EXTENDS | Trait.COLLECTS
_LAY = (p.gather_p, p.dynamic_slice_p, _compat.stack_p)


def way_moved(user: Node, position: int, axis: int) -> int:
    """Of an operation that computes no numbers: whether each token keeps all of its own."""
    primitive, size = user.primitive, user.ins[position].shape[axis]
    if primitive is p.dot_general_p:
        return UP if _picks_rows(user.ins[1 - position]) else LOST
    if has(primitive, Trait.SCATTERS):
        return UP if position == 2 and primitive in (p.scatter_p, p.scatter_max_p) else LOST
    if primitive is p.dynamic_update_slice_p:
        return UP if user.ins[1].shape[axis] == user.outs[0].shape[axis] else LOST
    if primitive is p.pad_p:
        return UP if min(user.params["padding_config"][axis]) >= 0 else LOST
    if not has(primitive, _LAYS) and primitive not in _LAY:
        return LOST
    there = result_axis(user, position, axis)
    cut = there is not None and 1 < user.outs[0].shape[there[0]] < size
    return LOST if cut else UP  # a part, or it lies elsewhere


def way_of_each(user: Node, position: int, turn: int, sign: int) -> int:
    """Of an operation on each number by itself, with others that are the same for all.

    Args:
      turn: how the order is turned if these are factors.
      sign: of the numbers: 1 if none is below zero, −1 if none is above, 0 if that is not known.
    """
    primitive = user.primitive
    if primitive is p.integer_pow_p:
        y = user.params["y"]
        return UP if y > 0 and (y % 2 or sign == 1) else DOWN if sign == 1 and y < 0 else LOST
    if primitive in _RISING:
        return UP
    if primitive in _RISING_ABOVE_ZERO:  # of chances below one the logarithm of the rest falls
        negated = primitive is p.log1p_p and sign == -1
        return UP if sign == 1 or negated else LOST
    kind = slope(primitive, position)
    if primitive is p.pow_p and position == 0:  # rises or falls as its exponent says
        kind = "?" if sign == 1 else "."
    if kind == "?":
        return turn
    return {"+": UP, "-": DOWN}.get(kind, LOST)


def is_noise(user: Node, other: Value, axis: int) -> bool:
    """Whether an operand is the same for all, or random numbers that are added, or that are above
    zero."""
    if not varies(other, axis):
        return True
    return is_random(other) and (has(user.primitive, Trait.ADDS) or is_above_zero(other))


def _picks_rows(value: Value) -> bool:
    """Whether each row is zero but for a one at one place."""
    made = origin(value, Trait.MOVES | Trait.KEEPS | Trait.CASTS).node
    if made is None or made.primitive is not p.eq_p:
        return False
    counted = (origin(side, Trait.MOVES | Trait.CASTS).node for side in made.ins)
    return any(node is not None and node.primitive is p.iota_p for node in counted)
