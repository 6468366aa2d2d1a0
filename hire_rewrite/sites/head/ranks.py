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
        self._known: dict[Value, bool] = {}

    def make(self, value: Value) -> bool:
        """Whether it is made of ranks, and of nothing else of the logits but of them in order."""
        if value not in self._known:
            self._known[value] = self._make(value)
        return self._known[value]

    def _make(self, value: Value) -> bool:

        def behind(value: Value) -> list[Value]:
            ends = self._is_rank(value) or self._is_put_in_order(value)
            return [] if ends else self._behind(value)

        ends = [each for each in reached([value], behind) if not behind(each)]
        others = (each for each in ends if not self._is_rank(each))
        return any(map(self._is_rank, ends)) and all(map(self._is_put_in_order, others))

    def _behind(self, value: Value) -> list[Value]:
        """What of the logits it is made of next, back to where they were put in order."""
        node = value.node
        if node is not None and has(node.primitive, Trait.ORDERS):
            return []
        numbers = node is not None and self._looks_up_numbers(node)
        return [v for v in made_from(value)[: 1 if numbers else None] if v in self._of_logits]

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
        """Whether numbers were sorted, or looked up in the order of a sort, all of them."""

        def behind(value: Value) -> Sequence[Value]:
            node = value.node
            if node is None or self._is_put_in_order(value):
                return ()
            if self._looks_up_numbers(node):
                return node.ins[:1]
            chosen = node.primitive is p.select_n_p
            each = has(node.primitive, _EACH) or node.primitive is p.rev_p
            return node.ins[chosen:] if each else ()

        ends = [v for v in reached([value], behind) if v in self._of_logits and not behind(v)]
        others = (end for end in ends if not _is_one_for_all(end))
        return any(map(self._is_put_in_order, ends)) and all(map(self._is_put_in_order, others))

    def _is_put_in_order(self, value: Value) -> bool:
        node = value.node
        if node is None or value not in self._of_logits:
            return False
        if node.primitive is p.sort_p:
            return True
        return self._looks_up_numbers(node) and self.make(node.ins[1])

    def _looks_up_numbers(self, node: Node) -> bool:
        looked_up = node.primitive in (p.gather_p, p.dynamic_slice_p)
        numbers = node.ins[0]
        return (
            looked_up and numbers in self._of_logits and jnp.issubdtype(numbers.dtype, jnp.floating)
        )


def _is_one_for_all(value: Value) -> bool:
    """Whether it is a greatest number, or a sum, and none for each token."""
    node = value.node
    reduces = node is not None and has(node.primitive, Trait.REDUCES)
    return node is not None and reduces and value.shape != node.ins[0].shape
