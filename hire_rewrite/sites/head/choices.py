"""Which logits a choice (`jnp.where`) keeps: the greatest, as all samplers do, or others.

A head guesses all but the greatest of its logits. A choice behind it is no matter if what it leaves
out is less than what it keeps, as top-k, top-p and a least probability do: the condition compares
the logits with one number for all. Of a list of allowed tokens, a band, or all but the greatest,
the greatest one that is kept may be a guess.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

import numpy as np
from jax.extend.core import primitives as p

from hire_rewrite.graph.nodes import Node, Value
from hire_rewrite.graph.traits import Trait, has
from hire_rewrite.patterns.axes import origin
from hire_rewrite.sites.head.along import counts_up, varies
from hire_rewrite.sites.head.ranks import Ranks
from hire_rewrite.sites.head.ways import LOST, UP

_SAME = Trait.CASTS | Trait.KEEPS


class Where(enum.Enum):
    """For which logits of a token a condition is true."""

    ALL = "all or none"
    GREAT = "those that are greater than the others"
    SMALL = "those that are less than the others"
    ONE = "one at most"
    OTHERS = "all but one at most"
    RANKS = "those of some ranks"
    SOME = "some"


_NOT = {
    Where.GREAT: Where.SMALL, Where.SMALL: Where.GREAT, Where.ONE: Where.OTHERS,
    Where.OTHERS: Where.ONE, Where.ALL: Where.ALL, Where.RANKS: Where.RANKS,
    Where.SOME: Where.SOME,
}  # fmt: skip


class Choices:
    """What conditions say about the logits of a head.

    Args:
      way: how a value is ordered along the vocabulary; None if that is not known.
      ranks: what is made of the ranks of the logits.
    """

    def __init__(self, way: Callable[[Value], int | None], ranks: Ranks) -> None:
        self._way, self._ranks = way, ranks
        self._known_where: dict[tuple[Value, int], Where] = {}

    def kept(
        self, choice: Node, position: int, axis: int, greatest_first: bool | None = None
    ) -> Where:
        """Which numbers a `select_n` takes from its operand at a position.

        Args:
          greatest_first: how that was sorted; None if it was not.
        """
        condition, *cases = choice.ins
        if not varies(condition, axis):
            return Where.ALL
        if len(cases) != 2:
            return Where.SOME
        first = _asks_for_the_first(condition)
        if greatest_first is None or first is None:
            where = self._where(condition, axis)
        else:
            where = Where.GREAT if first == greatest_first else Where.SMALL
        return where if position == 2 else _NOT[where]

    def _where(self, condition: Value, axis: int, depth: int = 64) -> Where:
        known = self._known_where
        if (condition, axis) not in known:
            known[condition, axis] = self._find_where(condition, axis, depth)
        return known[condition, axis]

    def _find_where(self, condition: Value, axis: int, depth: int) -> Where:
        if not varies(condition, axis):
            return Where.ALL
        if depth == 0:
            return Where.SOME
        node = condition.node
        if node is None or len(node.outs) != 1:
            return self._unknown(condition)
        if node.primitive is p.broadcast_in_dim_p:
            places = list(node.params["broadcast_dimensions"])
            return self._where(node.ins[0], places.index(axis), depth - 1)
        if has(node.primitive, _SAME) and node.ins[0].dtype == condition.dtype:
            return self._where(node.ins[0], axis, depth - 1)
        if node.primitive is p.not_p:
            return _NOT[self._where(node.ins[0], axis, depth - 1)]
        if node.primitive is p.and_p:
            return _both(*(self._where(operand, axis, depth - 1) for operand in node.ins))
        if node.primitive is p.or_p:
            return _NOT[
                _both(*(_NOT[self._where(operand, axis, depth - 1)] for operand in node.ins))
            ]
        if node.primitive is p.is_finite_p and self._known(node.ins[0]) is not None:
            return Where.ALL
        if has(node.primitive, Trait.COMPARES):
            return self._compared(node, axis)
        return self._unknown(condition)

    def _compared(self, node: Node, axis: int) -> Where:
        """Where numbers differ from others so."""
        one, other = node.ins
        turned = not varies(one, axis)
        if turned:
            one, other = other, one
        if varies(other, axis):  # z != z asks for NaN
            same = origin(one, Trait.CASTS) is origin(other, Trait.CASTS)
            return Where.ALL if same else self._unknown(node.outs[0])
        if node.primitive in (p.eq_p, p.ne_p):
            where = self._equal(one, other, axis)
            return where if node.primitive is p.eq_p else _NOT[where]
        way = self._known(one)
        if way is None:
            return self._unknown(node.outs[0])
        if way == LOST:
            return Where.SOME
        asks_for_great = (node.primitive in (p.gt_p, p.ge_p)) != turned
        return Where.GREAT if asks_for_great == (way == UP) else Where.SMALL

    def _equal(self, one: Value, other: Value, axis: int) -> Where:
        if counts_up(one, axis):
            return Where.ONE
        if self._known(one) in (None, LOST):
            return self._unknown(one)
        # Those that are −∞ or have no chance, but not those that are as great as the greatest.
        number = origin(other, Trait.CASTS | Trait.MOVES).literal
        least = number is not None and bool(np.all(np.asarray(number) <= 0))
        return Where.SMALL if least else Where.SOME

    def _known(self, value: Value) -> int | None:
        way = self._way(value)
        while way is None and value.node is not None and has(value.node.primitive, _SAME):
            value = value.node.ins[0]
            way = self._way(value)
        return way

    def _unknown(self, value: Value) -> Where:
        """What was computed in another way, in the order of the logits if they were put in order:
        nobody who samples keeps the lesser ones of those."""
        return Where.RANKS if self._ranks.make(value) else Where.SOME


def _asks_for_the_first(condition: Value) -> bool | None:
    """Whether it is true for the first numbers, or for the last, by their places; or None."""
    made = origin(condition, _SAME | Trait.MOVES).node
    if made is None or made.primitive not in (p.lt_p, p.le_p, p.gt_p, p.ge_p):
        return None
    counted = [any(counts_up(v, i) for i in range(len(v.shape))) for v in made.ins]
    if counted[0] == counted[1]:
        return None
    return (made.primitive in (p.lt_p, p.le_p)) == counted[0]


def _both(one: Where, other: Where) -> Where:
    """Where two conditions are true."""
    if one is other is Where.OTHERS:
        return Where.SOME  # all but two
    if one is other or other is Where.ALL:
        return one
    if one is Where.ALL:
        return other
    if Where.ONE in (one, other):
        return Where.ONE
    ordered = {one, other} <= {Where.RANKS, Where.GREAT, Where.SMALL}
    return Where.RANKS if ordered and Where.RANKS in (one, other) else Where.SOME
