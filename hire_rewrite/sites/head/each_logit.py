"""Which operations treat each logit by itself, so that candidates are chosen by what they return.

A guess has to lie as near to its logit behind them as before: no step may be in between, nor a
number that many logits become.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives as p

from hire_rewrite.graph.nodes import Node, Value
from hire_rewrite.graph.reach import reached
from hire_rewrite.graph.traits import Trait, has, slope
from hire_rewrite.patterns.axes import Window, keeps_tokens, operand_windows, origin, result_axis
from hire_rewrite.sites.head.along import varies
from hire_rewrite.sites.head.distortion import constant_of, is_negative
from hire_rewrite.sites.head.steps import may_level

Place = tuple[int, int]
"""An axis, and the row of the vocabulary that position 0 of it belongs to."""

_SAME = Trait.CASTS | Trait.KEEPS | Trait.MOVES
_JOINS = (p.and_p, p.or_p, p.not_p, p.xor_p)


def place_behind(node: Node, places: Mapping[Value, Place], tainted: set[Value]) -> Place | None:
    """Where the vocabulary is in the node's result, if the node treats each logit by itself.

    Args:
      places: the vocabulary in the values that are made of the logits so.
      tainted: these, and all others that are made of the logits.
    """
    touched = [i for i, value in enumerate(node.ins) if value in tainted]
    if node.bodies or len(node.outs) != 1 or any(node.ins[i] not in places for i in touched):
        return None
    # A condition is something for a `select_n` to ask about.
    is_condition = has(node.primitive, Trait.POINTWISE) and node.outs[0].dtype == jnp.bool_
    if not (is_condition or all(_rises(node, i, places) for i in touched)):
        return None
    behind: set[Place] = set()
    for i in touched:
        value = node.ins[i]
        axis, start = places[value]
        result = result_axis(node, i, axis)
        if result is None:
            return None
        window = Window(result[0], node.outs[0].shape[result[0]])
        inner = operand_windows(node, window)[i]
        if inner.picks or not keeps_tokens(node, value, inner, window):
            return None
        behind.add((result[0], start + result[1]))
    return behind.pop() if len(behind) == 1 else None


def _rises(node: Node, operand: int, places: Mapping[Value, Place]) -> bool:
    """Whether a larger operand gives a larger result, by about as much, as far as is known."""
    if node.primitive is p.select_n_p and operand == 0:
        return _is_no_step(node, places)
    value, (result,) = node.ins[operand], node.outs
    axis, _ = places[value]
    if has(node.primitive, Trait.CASTS) and _makes_steps(value.dtype, result.dtype):
        return False
    if may_level(node, operand, [v for v in node.ins if not varies(v, axis)]):
        return False
    kind = slope(node.primitive, operand)
    return kind == "+" or (kind == "?" and not any(map(is_negative, node.ins)))


def _makes_steps(before: jnp.dtype, after: jnp.dtype) -> bool:
    """Whether a cast is of a condition, or of a number to an integer."""
    floating = jnp.issubdtype(before, jnp.floating)
    return before == jnp.bool_ or (floating and not jnp.issubdtype(after, jnp.floating))


def _is_no_step(choice: Node, places: Mapping[Value, Place]) -> bool:
    """Whether logits near to where a condition about them changes have the same result on both
    sides: a penalty that multiplies what is positive, and divides what is not."""
    compared = _compared(choice.ins[0], places)
    if compared is None:
        return False
    return not compared or all(_is_multiple(case, compared, places) for case in choice.ins[1:])


def _compared(condition: Value, places: Mapping[Value, Place]) -> set[Value] | None:
    """The values that a condition compares with zero, but for those of which it asks only whether
    they are numbers; None if it compares one with something else."""

    def joined(value: Value) -> Sequence[Value]:
        node = value.node
        joins = node is not None and (node.primitive in _JOINS or has(node.primitive, _SAME))
        return node.ins if node is not None and joins and value in places else ()

    parts = reached([condition], joined)
    found = [_compared_by(part, places) for part in parts if not joined(part)]
    known = [values for values in found if values is not None]
    return set().union(*known) if len(known) == len(found) else None


def _compared_by(condition: Value, places: Mapping[Value, Place]) -> set[Value] | None:
    """Those of one comparison."""
    node = condition.node
    if condition not in places or (node is not None and node.primitive is p.is_finite_p):
        return set()
    if node is None:
        return None
    if not has(node.primitive, Trait.COMPARES):
        return None
    one, other = (origin(operand, Trait.CASTS) for operand in node.ins)
    if one is other:
        return set()
    logit, number = (node.ins[0], other) if node.ins[0] in places else (node.ins[1], one)
    constant = constant_of(number)
    if constant is None or np.ndim(constant) or number in places:
        return None
    value = float(np.asarray(constant))
    if not np.isfinite(value):
        return set()
    return {origin(logit, Trait.CASTS)} if value == 0 else None


def _is_multiple(value: Value, compared: set[Value], places: Mapping[Value, Place]) -> bool:
    """Whether a value is zero where all that were compared are: those times something."""
    value = origin(value, Trait.CASTS)
    if value in compared:
        return len(compared) == 1
    node = value.node
    if node is None or value not in places:
        return False
    if node.primitive is p.select_n_p:
        return all(_is_multiple(case, compared, places) for case in node.ins[1:])
    if node.primitive not in (p.mul_p, p.div_p):
        return False
    operands = node.ins[:1] if node.primitive is p.div_p else node.ins
    return any(_is_multiple(operand, compared, places) for operand in operands)
