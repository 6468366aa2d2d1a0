"""What is known of the values behind a head while they are followed (see `order`)."""

from __future__ import annotations

from collections.abc import Collection

import jax.numpy as jnp

from hire_rewrite.graph.nodes import Node, Value, source_of
from hire_rewrite.graph.traits import Trait, has
from hire_rewrite.sites.head.chances import Powers
from hire_rewrite.sites.head.flow import made_of
from hire_rewrite.sites.head.logits import Walk
from hire_rewrite.sites.head.ranks import Ranks
from hire_rewrite.sites.head.steps import is_stepped
from hire_rewrite.sites.head.taken_out import TakenOut
from hire_rewrite.sites.head.ways import LOST, UP


class Followed:
    """The values behind a head that were visited, and those to visit.

    Attributes:
      stack: values to visit, each with its vocabulary axis and its order along that.
      ways: how values are ordered along an axis, as far as that was followed.
      in_order: those of them that were sorted.
      lost: where the order of a value was lost.
      choices: operands of a `select_n`, each with its axis, that are judged at last.
      sums: over an axis of a value.
      masks: conditions about ranks.
      looked_up: numbers that may be guesses.
      reason: why a guess may decide something; None as long as none does.
      depth: how many of the greatest are read of those in order.
      rounding: the unit of the coarsest arithmetic so far.
    """

    def __init__(self, walk: Walk, inside: Collection[Node]) -> None:
        self.walk, self.inside, self.uses = walk, inside, walk.uses
        self.logits: set[Value] = set()
        self.stack: list[tuple[Value, int, int]] = []
        self.ways: dict[tuple[Value, int], int] = {}
        self.in_order: set[Value] = set()
        self.lost: dict[Value, Node] = {}
        self.choices: list[tuple[Node, int, int]] = []
        self.sums: list[tuple[Node, Value, int]] = []
        self.masks: list[Value] = []
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
        return is_stepped(value) and not self.ranks.went_into(value)

    def refuse(self, value: Value, way: int, why: str) -> None:
        blamed = self.lost.get(value)
        what = f"changed by {blamed.primitive} ({source_of(blamed)})" if blamed else "turned round"
        if way == UP:
            what = "the logits'"
        self.reason = (
            f"its logits are exact where they are greatest, and {why} in an order that is {what}"
        )

    def is_returned(self, mask: Value) -> bool:
        """Whether a condition about each token is a result of the function."""
        stack, seen = [mask], {mask}
        while stack:
            value = stack.pop()
            if value in self.uses.results and value.scope.parent is None:
                return True
            for user, _ in self.uses.users(value):
                same = has(user.primitive, Trait.POINTWISE | Trait.MOVES | Trait.KEEPS)
                new = [out for out in user.outs if same and out not in seen]
                stack += (out for out in new if not jnp.issubdtype(out.dtype, jnp.floating))
                seen.update(new)
        return False
