"""Logits that are looked up, or added up: whether something is decided by what they are.

The answers A to D, yes and no, the likeliest of several texts: those that are looked up may be none
of the greatest, and guesses.
"""

from __future__ import annotations

from collections.abc import Collection

import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives as p

from hire_rewrite.graph.nodes import Node, Uses, Value
from hire_rewrite.graph.traits import Trait, has
from hire_rewrite.patterns.axes import origin
from hire_rewrite.sites.head.along import is_random
from hire_rewrite.sites.head.distortion import constant_of

_DECISIONS = (p.argmin_p, p.sign_p)
_MOST = 64
"""Values that are looked at behind a lookup."""


def decided_by(numbers: Collection[Value], others: Collection[Value], uses: Uses) -> Node | None:
    """Where something is decided by some numbers, or by what is made of them anywhere: they are
    compared, or ranked; or None.

    Who asks whether they are numbers at all, or compares them with random ones, decides nothing.

    Args:
      others: values in which they may be a part of all numbers alike, and which are not followed.
    """
    stack, seen = list(numbers), {*numbers, *others}
    while stack:
        value = stack.pop()
        behind: list[Value] = _out_of(value) if value in uses.results else []
        for user, position in uses.users(value):
            if has(user.primitive, Trait.SEARCHES | Trait.ORDERS) or user.primitive in _DECISIONS:
                return user
            if has(user.primitive, Trait.COMPARES):
                if _decides(user, position):
                    return user
            elif user.bodies:
                links = (
                    (inner, link)
                    for body in user.bodies
                    for inner, link in zip(body.scope.inputs, body.inputs, strict=True)
                )
                behind += [inner for inner, link in links if link.outer is value]
            elif user.primitive is not p.is_finite_p:
                behind += user.outs
        new = [each for each in dict.fromkeys(behind) if each not in seen]
        stack += new
        seen.update(new)
    return None


def _decides(comparison: Node, position: int) -> bool:
    one, other = comparison.ins[position], comparison.ins[1 - position]
    if origin(one, Trait.CASTS) is origin(other, Trait.CASTS) or is_random(other):
        return False
    constant = constant_of(other)
    return constant is None or bool(np.isfinite(np.asarray(constant, np.float64)).any())


def _out_of(value: Value) -> list[Value]:
    """What a result of a body is outside of it, and in the next iteration."""
    node = value.scope.parent
    found: list[Value] = []
    for body in node.bodies if node is not None else ():
        for result, output in zip(body.scope.outputs, body.outputs, strict=True):
            if result is value and node is not None:
                found += [] if output.outer is None else [node.outs[output.outer]]
                found += (node.bodies[b].scope.inputs[i] for b, i in output.feeds)
    return found


def soon(value: Value, uses: Uses) -> list[Value]:
    """Numbers, and what is made of them next in their scope."""
    seen = [value]
    for current in seen:
        for user, _ in uses.users(current):
            if len(seen) < _MOST and not user.bodies:
                numbers = (out for out in user.outs if jnp.issubdtype(out.dtype, jnp.floating))
                seen += [out for out in numbers if out not in seen]
    return seen
