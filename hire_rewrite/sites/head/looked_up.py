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
from hire_rewrite.graph.provenance import body_of
from hire_rewrite.graph.traits import Trait, has
from hire_rewrite.patterns.axes import origin
from hire_rewrite.sites.head.along import is_random
from hire_rewrite.sites.head.distortion import constant_of
from hire_rewrite.sites.head.flow import in_bodies, leave

_DECISIONS = (p.argmin_p, p.sign_p, p.round_p, p.floor_p, p.ceil_p)
_SAME_INDEX = Trait.MOVES | Trait.CASTS | Trait.KEEPS | Trait.EXTENDS | Trait.CUTS
_SAME_INDICES = (p.clamp_p, p.min_p, p.max_p, p.gather_p, p.eq_p)


def says_which(index: Value, of_logits: Collection[Value]) -> bool:
    """Whether an index is where the greatest logits are, or one that was drawn, and nothing that is
    made of that.

    Args:
      of_logits: the values that depend on the logits.
    """
    stack, seen = [index], {index}
    while stack:
        value = stack.pop()
        node = value.node
        if value not in of_logits:
            continue
        if node is None:
            body, i = body_of(value)
            behind = [body.inputs[i].outer]
        elif node.bodies:
            behind = [
                result
                for body in node.bodies
                for result, output in zip(body.scope.outputs, body.outputs, strict=True)
                if output.outer is not None and node.outs[output.outer] is value
            ]
        elif has(node.primitive, Trait.SEARCHES | Trait.ORDERS):
            continue
        elif node.primitive is p.select_n_p:  # of which a negative one counts from the end
            cases = [origin(case, Trait.CASTS) for case in node.ins[1:]]
            behind = [c for c in cases if not _is_counted_from_the_end(c, cases)]
        elif node.primitive is p.gather_p and node.ins[0] not in of_logits:
            return False  # of a table
        elif has(node.primitive, _SAME_INDEX) or node.primitive in _SAME_INDICES:
            behind = list(node.ins)
        else:
            return False
        new = [each for each in dict.fromkeys(behind) if each not in seen]
        stack += new
        seen.update(new)
    return index in of_logits


def _is_counted_from_the_end(case: Value, others: Collection[Value]) -> bool:
    made = case.node
    if made is None or made.primitive is not p.add_p:
        return False
    return any(origin(operand, Trait.CASTS) in others for operand in made.ins)


def decided_by(numbers: Collection[Value], others: Collection[Value], uses: Uses) -> Node | None:
    """Where something is decided by some numbers, or by what is made of them anywhere: they are
    compared, ranked, or rounded to an integer; or None.

    Who asks whether they are numbers at all, compares them with random ones, or all logits with
    them, decides nothing that is not judged by how it treats these.

    Args:
      others: values along the vocabulary, in which they may be a part of all numbers alike, and
        which are not followed.
    """
    stack, seen = list(numbers), {*numbers, *others}
    while stack:
        value = stack.pop()
        behind: list[Value] = []
        if value in uses.results:
            behind += (there for there, _ in leave(value, 0))
        for user, position in uses.users(value):
            if has(user.primitive, Trait.SEARCHES | Trait.ORDERS) or user.primitive in _DECISIONS:
                return user
            if has(user.primitive, Trait.COMPARES):
                if _decides(user, position, others):
                    return user
            elif user.bodies:
                behind += in_bodies(user, value)
            elif user.primitive is p.is_finite_p:
                continue
            elif jnp.issubdtype(value.dtype, jnp.floating) and not all(map(_is_number, user.outs)):
                return user
            else:
                behind += user.outs
        new = [each for each in dict.fromkeys(behind) if each not in seen]
        stack += new
        seen.update(new)
    return None


def _is_number(value: Value) -> bool:
    return not hasattr(value.aval, "dtype") or jnp.issubdtype(value.dtype, jnp.floating)


def _decides(comparison: Node, position: int, vocabulary: Collection[Value]) -> bool:
    one, other = comparison.ins[position], comparison.ins[1 - position]
    if origin(one, Trait.CASTS) is origin(other, Trait.CASTS) or is_random(other):
        return False
    if other in vocabulary:
        return False
    constant = constant_of(other)
    return constant is None or bool(np.isfinite(np.asarray(constant, np.float64)).any())
