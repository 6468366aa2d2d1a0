"""What is made of ranks: of the places that a sort or a top k gives tokens, or of sums of the
greatest chances, one after the other, as top p asks for."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import jax.numpy as jnp
from jax.extend.core import primitives as p

from hire_rewrite.graph.nodes import Node, Value
from hire_rewrite.graph.reach import reached
from hire_rewrite.graph.traits import Trait, has
from hire_rewrite.sites.head.chances import Powers
from hire_rewrite.sites.head.flow import made_from

_EACH = Trait.POINTWISE | Trait.MOVES | Trait.KEEPS
_SUMS = (p.cumsum_p, p.cumlogsumexp_p)


class Ranks:
    """Which values are made of ranks.

    Args:
      of_logits: the values that depend on a head's logits.
    """

    def __init__(self, powers: Powers, of_logits: Collection[Value]) -> None:
        self._powers, self._of_logits = powers, of_logits

    def went_into(self, value: Value) -> bool:
        """Whether ranks of logits went into it: numbers at ranks are numbers."""

        def behind(value: Value) -> list[Value]:
            node = value.node
            if value not in self._of_logits or (node and has(node.primitive, Trait.ORDERS)):
                return []
            numbers = node is not None and self._looks_up_numbers(node)
            return made_from(value)[: 1 if numbers else None]

        return any(map(self._is_rank, reached([value], behind)))

    def _is_rank(self, value: Value) -> bool:
        """Whether a value is ranks, or a sum of the greatest before each."""
        node = value.node
        if value not in self._of_logits or node is None:
            return False
        if has(node.primitive, Trait.ORDERS):
            return jnp.issubdtype(value.dtype, jnp.integer)
        return self.is_sum_of_the_greatest(node)

    def is_sum_of_the_greatest(self, node: Node) -> bool:
        """Whether an operation adds up chances that were put in order, one after the other."""
        if node.primitive not in _SUMS or not self.in_order(node.ins[0]):
            return False
        return node.primitive is p.cumlogsumexp_p or self._powers.sign(node.ins[0]) != 0

    def in_order(self, value: Value) -> bool:
        """Whether numbers were sorted, or looked up in the order of a sort."""

        def behind(value: Value) -> Sequence[Value]:
            node = value.node
            if node is None or value not in self._of_logits:
                return ()
            if self._looks_up_numbers(node):
                return node.ins[:1]
            return node.ins if has(node.primitive, _EACH) or node.primitive is p.rev_p else ()

        return any(map(self._is_put_in_order, reached([value], behind)))

    def _is_put_in_order(self, value: Value) -> bool:
        node = value.node
        if node is None or value not in self._of_logits:
            return False
        if node.primitive is p.sort_p:
            return True
        return self._looks_up_numbers(node) and self.went_into(node.ins[1])

    def _looks_up_numbers(self, node: Node) -> bool:
        looked_up = node.primitive in (p.gather_p, p.dynamic_slice_p)
        numbers = node.ins[0]
        return (
            looked_up and numbers in self._of_logits and jnp.issubdtype(numbers.dtype, jnp.floating)
        )
