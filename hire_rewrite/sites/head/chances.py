"""Powers of logits, as a softmax makes them: what is above zero, and what sums of them are near.

A sum of the powers of all logits is nearly the dense head's: guesses lie around their logits, and
the greatest, which are exact, count most. So is a mean that is weighted with them, as an entropy
is. A sum of other numbers is one of guesses.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives as p

from hire_rewrite.graph.nodes import Node, Value
from hire_rewrite.graph.reach import reached
from hire_rewrite.graph.traits import Trait, has
from hire_rewrite.sites.head.along import varies
from hire_rewrite.sites.head.distortion import constant_of

_SAME = Trait.MOVES | Trait.CASTS | Trait.KEEPS | Trait.CUTS
_OF_FIRST = (p.gather_p, p.dynamic_slice_p, p.rev_p, p.cumsum_p, p.reduce_sum_p, p.reduce_max_p)
_OF_ALL = (p.add_p, p.max_p, p.min_p, p.clamp_p, p.concatenate_p)
_STEPS = (p.sign_p, p.round_p, p.floor_p, p.ceil_p, p.rem_p)


class Powers:
    """Which values are powers of logits, or made of such.

    Args:
      product: what the logits come from.
      of_logits: the values that depend on it.
    """

    def __init__(self, product: Node, of_logits: Collection[Value]) -> None:
        self._product, self._of_logits = product, of_logits
        self._signs: dict[Value, int] = {}

    def sign(self, value: Value) -> int:
        """1 if all of them are above zero or zero, −1 if none is above, 0 if nobody knows."""
        if value not in self._of_logits:
            number = constant_of(value)
            if number is None or not np.size(number):
                return 0
            array = np.asarray(number, np.float64)
            return 1 if (array >= 0).all() else -1 if (array <= 0).all() else 0
        if value not in self._signs:
            self._signs[value] = 0  # while it is looked for
            self._signs[value] = self._sign(value) if value.node is not None else 0
        return self._signs[value]

    def _sign(self, value: Value) -> int:
        node = value.node
        assert node is not None
        primitive = node.primitive
        if primitive in (p.exp_p, p.exp2_p):
            return 1
        if has(primitive, _SAME) or primitive in _OF_FIRST:
            return self.sign(node.ins[0])
        if primitive is p.sort_p:
            return self.sign(node.ins[node.outs.index(value)])
        if primitive is p.neg_p:
            return -self.sign(node.ins[0])
        if primitive in (p.mul_p, p.div_p):  # a factor that nobody knows is above zero
            signs = [
                1 if v not in self._of_logits and constant_of(v) is None else self.sign(v)
                for v in node.ins
            ]
            return signs[0] * signs[1]
        if primitive in (p.pow_p, p.integer_pow_p, p.sqrt_p, p.square_p):
            return 1 if self.sign(node.ins[0]) == 1 else 0
        if primitive in _OF_ALL or primitive is p.select_n_p:
            first = primitive is p.select_n_p
            signs = [self.sign(v) for v in node.ins[first:]]
            return signs[0] if len(set(signs)) == 1 else 0
        return 0

    def weigh(self, value: Value, axis: int, rises: Callable[[Value], bool]) -> bool:
        """Whether numbers along the vocabulary are those of a mean that is weighted with chances.

        Args:
          rises: whether a value has the order of the logits.
        """
        node = value.node
        if node is None or value not in self._of_logits:
            return value not in self._of_logits and not varies(value, axis)
        if has(node.primitive, Trait.CASTS | Trait.KEEPS) or node.primitive is p.neg_p:
            return self.weigh(node.ins[0], axis, rises)
        if node.primitive is p.select_n_p:
            return all(self.weigh(case, axis, rises) for case in node.ins[1:])
        if node.primitive not in (p.mul_p, p.div_p):
            return False
        one, other = node.ins
        fixed = [v for v in node.ins if v not in self._of_logits and not varies(v, axis)]
        if fixed:
            return self.weigh(other if one in fixed else one, axis, rises)
        if node.primitive is p.div_p:
            return not varies(other, axis) and self.weigh(one, axis, rises)
        pairs = ((one, other), (other, one))
        return any(self.sign(a) == 1 and rises(a) and self._is_smooth(b, axis) for a, b in pairs)

    def _is_smooth(self, value: Value, axis: int) -> bool:
        """Whether logits alone went into numbers, and no step is between."""
        if value not in self._of_logits:
            return not varies(value, axis)
        for each in self._made_from(value):
            node = each.node
            if node is None or node is self._product:
                continue
            others = [v for v in node.ins if v not in self._of_logits]
            if node.primitive is p.select_n_p:
                others = [v for v in others if v is not node.ins[0]]
            given = any(len(v.shape) == len(each.shape) and varies(v, axis) for v in others)
            if given or node.primitive in _STEPS or not jnp.issubdtype(each.dtype, jnp.floating):
                return False
        return True

    def _made_from(self, value: Value) -> Iterator[Value]:
        """A value, and what it is made of but for what chooses, back to the logits."""

        def behind(value: Value) -> list[Value]:
            node = value.node
            if node is None or node is self._product:
                return []
            chooses = node.primitive is p.select_n_p
            return [v for v in node.ins[chooses:] if v in self._of_logits]

        return reached([value], behind)


def is_fill(value: Value, way: int, sign: int) -> bool:
    """Whether what takes the place of logits that are left out is below all that is kept: −∞, or a
    great negative number, or zero among powers.

    Args:
      way: 1 if the greatest of those that are kept belong to the greatest logits, −1 if the least.
      sign: of the numbers (see `Powers.sign`).
    """
    number = constant_of(value)
    if number is None or not np.size(number) or way == 0:
        return False
    greatest = float(np.max(way * np.asarray(number, np.float64)))
    return greatest <= (0.0 if sign == way else -1e3)
