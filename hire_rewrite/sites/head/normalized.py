"""Chances of tokens, and their logarithms: between which numbers the greatest of them lie.

Among V chances the greatest is at least 1 / V, and no two are above one half. A floor or a cap
outside of that makes no two of the greatest equal.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
from jax.extend.core import Primitive
from jax.extend.core import primitives as p

from hire_rewrite.graph.nodes import Node, Value
from hire_rewrite.graph.traits import Trait, has
from hire_rewrite.patterns.axes import origin
from hire_rewrite.sites.head.chances import Powers
from hire_rewrite.sites.head.distortion import constant_of

_SAME = Trait.CASTS | Trait.MOVES | Trait.KEEPS
_ELSEWHERE = (p.rev_p, p.gather_p)
_LIMITS = (p.max_p, p.min_p, p.clamp_p)


class Normalized:
    """Which values are chances, or their logarithms, as they are or with some left out.

    Args:
      of_logits: the values that depend on a head's logits.
    """

    def __init__(self, powers: Powers, of_logits: Collection[Value]) -> None:
        self._powers, self._of_logits = powers, of_logits

    def limits(self, value: Value, count: int) -> tuple[float, float] | None:
        """What the greatest of `count` numbers is not below, and no two are above; None if they are
        neither chances nor logarithms of such."""
        if self.are_chances(value):
            return 1 / max(count, 1), 0.5
        return (-math.log(max(count, 1)), math.log(0.5)) if self.are_logarithms(value) else None

    def are_chances(self, value: Value) -> bool:
        """Whether they are a softmax, or other numbers above zero over their sum."""
        value = self._elsewhere(value, 1.0)
        if exponents := _made_by(value, p.exp_p):
            return self.are_logarithms(*exponents)
        quotient = _made_by(value, p.div_p)
        if not quotient or self._powers.sign(quotient[0]) != 1:
            return False
        summed = _made_by(quotient[1], p.reduce_sum_p)
        return bool(summed) and _is_same(summed[0], quotient[0])

    def are_logarithms(self, value: Value) -> bool:
        """Whether they are a log-softmax, or the logarithms of chances."""
        value = self._elsewhere(value, 0.0)
        if chances := _made_by(value, p.log_p):
            return self.are_chances(*chances)
        difference = _made_by(value, p.sub_p)
        return bool(difference) and _is_normalizer(difference[1], difference[0])

    def _elsewhere(self, value: Value, most: float) -> Value:
        """The numbers that are here, in another order, or with others of at most so much for some
        of them."""
        while (node := value.node) is not None:
            if has(node.primitive, _SAME) or node.primitive in _ELSEWHERE:
                value = node.ins[0]
            elif node.primitive is p.sort_p:
                value = node.ins[node.outs.index(value)]
            elif node.primitive in _LIMITS or node.primitive is p.select_n_p:
                cases = node.ins[node.primitive is p.select_n_p :]
                numbers = [case for case in cases if case in self._of_logits]
                if len(numbers) != 1 or not all(_is_at_most(v, most) for v in self._raising(node)):
                    break
                (value,) = numbers
            else:
                break
        return value

    def _raising(self, node: Node) -> list[Value]:
        """What may take the place of lesser numbers."""
        if node.primitive is p.min_p:
            return []
        cases = node.ins[:1] if node.primitive is p.clamp_p else node.ins
        chosen = node.primitive is p.select_n_p
        return [case for case in cases[chosen:] if case not in self._of_logits]


def _is_at_most(value: Value, most: float) -> bool:
    number = constant_of(value)
    return number is not None and bool((np.asarray(number, np.float64) <= most).all())


def _is_normalizer(value: Value, numbers: Value) -> bool:
    """Whether it is the logarithm of the sum of the powers of numbers."""
    node = origin(value, _SAME).node
    if node is None or node.primitive is not p.add_p:
        return _is_same(_added_up(value), numbers)
    for one, other in (node.ins, node.ins[::-1]):  # the greatest, which was subtracted before
        lessened = _made_by(_added_up(one), p.sub_p)
        if lessened and _is_same(lessened[0], numbers) and _is_same(lessened[1], other):
            return True
    return False


def _added_up(value: Value) -> Value | None:
    """The numbers whose powers were added up, if a value is the logarithm of that."""
    for primitive in (p.log_p, p.abs_p, p.reduce_sum_p, p.exp_p):
        operands = _made_by(value, primitive)
        if operands:
            (value,) = operands
        elif primitive is not p.abs_p:  # as jax.nn.logsumexp has it, and others have not
            return None
    return value


def _made_by(value: Value | None, primitive: Primitive) -> tuple[Value, ...]:
    """What a primitive computed a value from; nothing if another one did."""
    node = origin(value, _SAME).node if value is not None else None
    return node.ins if node is not None and node.primitive is primitive else ()


def _is_same(one: Value | None, other: Value) -> bool:
    return one is not None and origin(one, _SAME) is origin(other, _SAME)
