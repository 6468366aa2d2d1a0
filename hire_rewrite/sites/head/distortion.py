"""What is done to logits one by one, and what is not.

Logits are scaled, shifted, capped and masked one by one, and otherwise taken all together: ranked,
or normalized. Whoever squashes, rectifies or squares them has something else: the pixels of a
reconstruction, say, or labels that do not exclude each other.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives as p

from hire_rewrite.graph.nodes import Node, Uses, Value
from hire_rewrite.graph.traits import Trait, has
from hire_rewrite.patterns.axes import origin


def is_distorted(user: Node, position: int, logits: Collection[Value], uses: Uses) -> bool:
    """Whether an operation does to each number by itself what is not done to logits.

    Args:
      position: the operand of `user` that holds them.
      logits: all values that are made of them.
    """
    primitive, result = user.primitive, user.outs[0]
    if not has(primitive, Trait.POINTWISE) or not jnp.issubdtype(result.dtype, jnp.floating):
        return False
    if has(primitive, Trait.KEEPS | Trait.ADDS | Trait.CASTS):
        return False
    others = [value for i, value in enumerate(user.ins) if i != position]
    if primitive is p.select_n_p:  # a ReLU, say; a mask has other numbers
        return position == 0 and _asks_for_size(user.ins[0]) and any(map(_is_small, others))
    if any(value in logits for value in others):  # a square, say
        return True
    if primitive is p.tanh_p:
        return not _is_stretched(result, uses)
    if primitive in (p.max_p, p.min_p, p.clamp_p):
        return any(map(_is_small, others))
    return not has(primitive, Trait.LINEAR) or (primitive is p.div_p and position == 1)


def _is_stretched(bounded: Value, uses: Uses) -> bool:
    """Whether numbers between −1 and 1 get another range, as in the soft cap c · tanh(z / c)."""
    if bounded in uses.results:
        return False
    for user, position in uses.users(bounded):
        if has(user.primitive, Trait.CASTS | Trait.KEEPS | Trait.MOVES | Trait.CUTS):
            if not _is_stretched(user.outs[0], uses):
                return False
        elif user.primitive is not p.mul_p or _is_small(user.ins[1 - position]):
            return False
    return True


def _asks_for_size(condition: Value) -> bool:
    made = condition.node
    return made is not None and made.primitive in (p.gt_p, p.ge_p, p.lt_p, p.le_p)


def _is_small(value: Value) -> bool:
    """Whether a value is a number between −1 and 1 that is written into the program."""
    literal = origin(value, Trait.CASTS | Trait.MOVES).literal
    return literal is not None and bool(np.all(np.abs(np.asarray(literal)) <= 1))


def constant_of(value: Value) -> Any:
    """The number, or the array, of the program that a value is, cast and laid out anew; or None."""
    source = origin(value, Trait.CASTS | Trait.MOVES)
    number = source.const if source.literal is None else source.literal
    return None if isinstance(number, jax.core.Tracer) else number  # closed over, of a jit around


def is_negative(value: Value) -> bool:
    """Whether a value is a number below zero that is written into the program, or is negated."""
    number, source = constant_of(value), origin(value, Trait.CASTS | Trait.MOVES)
    if number is not None and np.ndim(number) <= 1:
        return bool(np.all(np.asarray(number) < 0))
    made = source.node
    if made is not None and made.primitive is p.log1p_p:  # as random numbers, to be negated, are
        return is_negative(made.ins[0])
    return made is not None and made.primitive is p.neg_p and not is_negative(made.ins[0])
