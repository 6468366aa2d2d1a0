"""What leaves of the order of great logits nothing but steps: conditions, integers, caps, floors.

Several logits are one number behind it. Who looks for the greatest finds the first of equal ones,
and who counts, counts all: any of them may be a guess.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives as p

from hire_rewrite.graph.nodes import Node, Value
from hire_rewrite.graph.traits import Trait
from hire_rewrite.patterns.axes import origin
from hire_rewrite.sites.head.distortion import constant_of


def is_stepped(value: Value) -> bool:
    """Whether a value that is made of logits is a decision about each of them, or an integer.

    Whether they are numbers at all is none.
    """
    if jnp.issubdtype(value.dtype, jnp.floating):
        return False
    node = value.node
    if node is not None and node.primitive is p.is_finite_p:
        return False
    if node is not None and node.primitive in (p.eq_p, p.ne_p):
        one, other = (origin(operand, Trait.CASTS) for operand in node.ins)
        return one is not other
    return True


_GUARD = 1e3
"""What limits logits to such sizes guards against an overflow, and meets none."""


def may_level(
    node: Node,
    position: int,
    bounds: Collection[Value],
    low: float = -_GUARD,
    high: float = _GUARD,
) -> bool:
    """Whether a cap or a floor may make several of the greatest numbers equal.

    Args:
      position: of the numbers among the operands.
      bounds: the operands that are caps and floors if the node is made for that.
      low, high: what the greatest number is not below, and no two are above.
    """
    others = [v for i, v in enumerate(node.ins) if i != position and v in bounds]
    if node.primitive is p.max_p:
        floors, caps = others, []
    elif node.primitive is p.min_p:
        floors, caps = [], others
    elif node.primitive is p.clamp_p and position == 1:
        floors, caps = others[:1], others[1:]
    else:
        return node.primitive is p.clamp_p
    lows, highs = map(_number, floors), map(_number, caps)
    return not (all(n <= low for n in lows) and all(n >= high for n in highs))


def _number(value: Value) -> float:
    """The number that a value is, as the program has it; NaN if it is none, or several."""
    number = constant_of(value)
    return float(np.asarray(number)) if number is not None and np.ndim(number) == 0 else math.nan
