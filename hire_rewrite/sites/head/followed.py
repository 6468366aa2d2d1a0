"""What is known of the values behind a head while they are followed (see `order`)."""

from __future__ import annotations

from collections.abc import Collection

import jax.numpy as jnp
from jax.extend.core import primitives as p

from hire_rewrite.graph.nodes import Node, Value, source_of
from hire_rewrite.graph.traits import Trait, has
from hire_rewrite.patterns.axes import ordered_axis
from hire_rewrite.sites.head.chances import Powers
from hire_rewrite.sites.head.flow import in_bodies, leave, made_from, made_of
from hire_rewrite.sites.head.logits import Walk
from hire_rewrite.sites.head.looked_up import says_which
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

    def known_way(self, value: Value) -> int | None:
        ways = {self.ways[value, i] for i in range(len(value.shape)) if (value, i) in self.ways}
        return ways.pop() if len(ways) == 1 else LOST if ways else None

    def is_stepped(self, value: Value) -> bool:
        """Whether it is a decision about each logit, but for those about ranks, as of top p."""
        return self.asks(value) and not self.ranks.went_into(value)

    def asks(self, value: Value) -> bool:
        """Whether it is a decision about each logit: a condition, but for whether it is a number at
        all, if none was made infinite by a choice."""
        if is_stepped(value) or jnp.issubdtype(value.dtype, jnp.floating):
            return is_stepped(value)
        stack, seen = [value], {value}
        while stack:
            current = stack.pop()
            node = current.node
            if node is not None and node.primitive is p.select_n_p:
                condition = node.ins[0]
                if condition in self.of_logits and is_stepped(condition):
                    return True
            new = [v for v in made_from(current) if v in self.of_logits and v not in seen]
            stack += new
            seen.update(new)
        return False

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
        stack, seen = [mask], {mask}
        while stack:
            value = stack.pop()
            behind = [there for there, _ in leave(value, 0)] if value in self.uses.results else []
            if value in self.uses.results and value.scope.parent is None:
                return True
            for user, position in self.uses.users(value):
                chooses = user.primitive is p.select_n_p and position == 0
                of_logits = any(case in self.of_logits for case in user.ins[1:])
                if chooses and of_logits and user.outs[0].dtype != jnp.bool_:
                    continue
                if user.primitive is p.cond_p:
                    behind += in_bodies(user, value)
                elif all(out.dtype == jnp.bool_ for out in user.outs) and has(
                    user.primitive, _KEEP_MASKS
                ):
                    behind += user.outs
                else:
                    return True
            new = [each for each in behind if each not in seen]
            stack += new
            seen.update(new)
        return False
