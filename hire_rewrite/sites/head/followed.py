"""What is known of the values behind a head while they are followed (see `order`)."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import jax.numpy as jnp
from jax.extend.core import primitives as p

from hire_rewrite.graph.nodes import Node, Value, source_of
from hire_rewrite.graph.reach import reached
from hire_rewrite.graph.traits import Trait, has
from hire_rewrite.patterns.axes import ordered_axis
from hire_rewrite.sites.head.chances import Powers
from hire_rewrite.sites.head.factors import Factors
from hire_rewrite.sites.head.flow import in_bodies, leave, made_from, made_of
from hire_rewrite.sites.head.logits import Walk
from hire_rewrite.sites.head.looked_up import says_which
from hire_rewrite.sites.head.normalized import Normalized
from hire_rewrite.sites.head.ranks import Ranks
from hire_rewrite.sites.head.steps import is_stepped
from hire_rewrite.sites.head.taken_out import TakenOut
from hire_rewrite.sites.head.ways import LOST, UP

_KEEP_MASKS = Trait.POINTWISE | Trait.MOVES | Trait.KEEPS | Trait.EXTENDS | Trait.SCATTERS


class Followed:
    """The values behind a head that were visited, and those to visit.

    Attributes:
      vocabulary: the values along the vocabulary, each with its axis.
      stack: values to visit, each with its vocabulary axis and its order along that.
      ways: how values are ordered along an axis, as far as that was followed.
      in_order: those of them that were sorted.
      lost: where the order of a value was lost.
      choices: operands of a `select_n`, each with its axis, that are judged at last.
      sums: over an axis of a value.
      masks: conditions about ranks.
      greatest_first: whether sorted numbers begin with those of the greatest logits.
      cut: those of them a part of which is read.
      looked_up: numbers that may be guesses.
      reason: why a guess may decide something; None as long as none does.
      depth: how many of the greatest are read of those in order.
      rounding: the unit of the coarsest arithmetic so far.
    """

    def __init__(self, walk: Walk, inside: Collection[Node]) -> None:
        self.walk, self.inside, self.uses = walk, inside, walk.uses
        self.vocabulary = {(value, axis) for value, axis, part in walk.seen if not part}
        self.logits: set[Value] = set()
        self.stack: list[tuple[Value, int, int]] = []
        self.ways: dict[tuple[Value, int], int] = {}
        self.in_order: set[Value] = set()
        self.lost: dict[Value, Node] = {}
        self.choices: list[tuple[Node, int, int]] = []
        self.sums: list[tuple[Node, Value, int]] = []
        self.masks: list[Value] = []
        self.greatest_first: dict[Value, bool] = {}
        self.cut: list[Value] = []
        self.looked_up: list[Value] = []
        self.reason: str | None = None
        self.taken = TakenOut(walk.product, self.logits)
        self.depth = 0
        self.rounding = 0.0
        self.of_logits = made_of(walk.product, walk.uses)
        self.powers = Powers(walk.product, self.of_logits)
        self.ranks = Ranks(self.powers, self.of_logits)
        self.normalized = Normalized(self.powers, self.of_logits)
        self.factors = Factors(self.powers, self.normalized, self.of_logits)

    def known_way(self, value: Value) -> int | None:
        ways = {self.ways[value, i] for i in range(len(value.shape)) if (value, i) in self.ways}
        return ways.pop() if len(ways) == 1 else LOST if ways else None

    def is_stepped(self, value: Value) -> bool:
        """Whether it is a decision about each logit, but for those about ranks, as of top p."""
        return self.asks(value) and not self.ranks.make(value)

    def asks(self, value: Value) -> bool:
        """Whether it is a decision about each logit: a condition, but for whether it is a number at
        all, if none was made infinite by a choice."""
        if is_stepped(value) or jnp.issubdtype(value.dtype, jnp.floating):
            return is_stepped(value)

        def behind(value: Value) -> list[Value]:
            return [v for v in made_from(value) if v in self.of_logits]

        return any(map(self._is_chosen_by_logits, reached([value], behind)))

    def _is_chosen_by_logits(self, value: Value) -> bool:
        node = value.node
        if node is None or node.primitive is not p.select_n_p:
            return False
        return node.ins[0] in self.of_logits and is_stepped(node.ins[0])

    def refuse(self, value: Value, way: int, why: str) -> None:
        blamed = self.lost.get(value)
        what = f"changed by {blamed.primitive} ({source_of(blamed)})" if blamed else "turned round"
        if way == UP:
            what = "the logits'"
        self.reason = (
            f"its logits are exact where they are greatest, and {why} in an order that is {what}"
        )

    def says_which(self, index: Value, size: int) -> bool:
        """Whether an index is where the greatest logits are (see `looked_up.says_which`)."""

        def searches(search: Node) -> bool:
            value = search.ins[0]
            axes = search.params.get("axes", (ordered_axis(search),))
            sorted_ = size in value.shape and self.ranks.in_order(value)
            return sorted_ or any((value, axis) in self.vocabulary for axis in axes)

        return says_which(index, self.of_logits, size, searches)

    def asked_otherwise(self, mask: Value) -> bool:
        """Whether a condition about each token is asked for otherwise than to choose logits."""

        def behind(value: Value) -> Iterator[Value]:
            if value in self.uses.results:
                yield from (there for there, _ in leave(value, 0))
            for user, _ in self.uses.users(value):
                if user.primitive is p.cond_p:
                    yield from in_bodies(user, value)
                elif _keeps_masks(user):
                    yield from user.outs

        return any(map(self._is_asked, reached([mask], behind)))

    def _is_asked(self, mask: Value) -> bool:
        """Whether a condition is returned, or read but to choose logits, or for another one."""
        if mask in self.uses.results and mask.scope.parent is None:
            return True
        return not all(
            user.primitive is p.cond_p
            or _keeps_masks(user)
            or (position == 0 and self._chooses_logits(user))
            for user, position in self.uses.users(mask)
        )

    def _chooses_logits(self, user: Node) -> bool:
        of_logits = any(case in self.of_logits for case in user.ins[1:])
        return user.primitive is p.select_n_p and of_logits and user.outs[0].dtype != jnp.bool_


def _keeps_masks(user: Node) -> bool:
    """Whether conditions become conditions."""
    return has(user.primitive, _KEEP_MASKS) and all(out.dtype == jnp.bool_ for out in user.outs)
