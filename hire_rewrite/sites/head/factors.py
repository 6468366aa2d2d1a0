"""The sign of what all logits of a token are multiplied with.

A temperature that is made of an entropy, the greatest logit, the normalizer of a softmax: below
zero it turns the order round, and it may be a guess that tells. Numbers that are never zero but by
chance are above or below it.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
from jax.extend.core import primitives as p

from hire_rewrite.graph.nodes import Node, Value
from hire_rewrite.graph.sources import sources_first
from hire_rewrite.graph.traits import Trait, has
from hire_rewrite.sites.head.chances import Powers
from hire_rewrite.sites.head.distortion import constant_of, is_negative
from hire_rewrite.sites.head.normalized import Normalized

_ABOVE = (p.exp_p, p.exp2_p, p.abs_p, p.logistic_p, p.square_p)
_AS_FIRST = (p.reduce_sum_p, p.reduce_max_p, p.reduce_min_p, p.cbrt_p, p.sinh_p, p.tanh_p)
_SAME = Trait.CASTS | Trait.MOVES | Trait.KEEPS | Trait.CUTS
_ABOVE_IF = (p.sqrt_p, p.rsqrt_p, p.pow_p, p.log1p_p)
"""Of a first operand above zero above it, otherwise it is not known."""


class Factors:
    """The signs of numbers: 1 above zero, −1 below, 0 if that is not known.

    Args:
      of_logits: the values that depend on a head's logits; others are as they are told to be.
    """

    def __init__(
        self, powers: Powers, normalized: Normalized, of_logits: Collection[Value]
    ) -> None:
        self._powers, self._normalized, self._of_logits = powers, normalized, of_logits
        self._signs: dict[Value, int] = {}

    def sign(self, value: Value) -> int:
        if value not in self._of_logits:
            return _given(value)
        for each in sources_first(value, self._signs, self._of_logits.__contains__):
            self._signs[each] = self._made_by(each.node, each) if each.node is not None else 0
        return self._signs[value]

    def _made_by(self, node: Node, value: Value) -> int:
        primitive = node.primitive
        if primitive in _ABOVE or (primitive is p.integer_pow_p and node.params["y"] % 2 == 0):
            return 1
        if primitive in (p.log_p, p.sub_p) and self._normalized.are_logarithms(value):
            return -1
        if primitive is p.reduce_sum_p and (sign := self._powers.sign(node.ins[0])):
            return sign  # not all of them are zero
        signs = [self.sign(operand) for operand in node.ins]
        if has(primitive, _SAME) or primitive in _AS_FIRST:
            return signs[0]
        if primitive is p.integer_pow_p or primitive in _ABOVE_IF:
            return max(signs[0], 0)
        if primitive is p.neg_p:
            return -signs[0]
        if primitive in (p.mul_p, p.div_p):
            squared = primitive is p.mul_p and node.ins[0] is node.ins[1]
            return 1 if squared else math.prod(signs)
        if primitive is p.sub_p:
            signs[1] *= -1
        elif primitive is p.clamp_p:
            low, number, high = signs
            signs = [1] if low == 1 else [-1] if high == -1 else [low, number, high]
        elif primitive is p.max_p and 1 in signs:
            signs = [1]
        elif primitive is p.min_p and -1 in signs:
            signs = [-1]
        elif primitive is p.select_n_p:
            cases = zip(node.ins[1:], signs[1:], strict=True)
            signs = [sign for case, sign in cases if not _is_nan(case)]
        elif primitive not in (p.add_p, p.max_p, p.min_p):
            return 0
        return signs[0] if len(set(signs)) == 1 else 0


def _is_nan(value: Value) -> bool:
    number = constant_of(value)
    return number is not None and bool(np.isnan(np.asarray(number, np.float64)).all())


def _given(value: Value) -> int:
    """Of what is given at the call that it is above zero, as a temperature is."""
    number = constant_of(value)
    if number is None or not np.size(number):
        return -1 if is_negative(value) else 1
    array = np.asarray(number, np.float64)
    return 1 if (array > 0).all() else -1 if (array < 0).all() else 0
