"""How many of the greatest logits a program takes out of the order, one by one or a few at once.

As where a token is forbidden, or where the greatest is looked for again and again. The greatest of
the others are the next ones, which have to be exact, too.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
from jax.extend.core import primitives as p

from hire_rewrite.graph.nodes import Node, Value
from hire_rewrite.graph.traits import Trait
from hire_rewrite.patterns.axes import origin

_FEW = 16
"""Tokens that a program may forbid by a scatter: of 64 exact logits enough are left."""

LAID = Trait.CASTS | Trait.MOVES | Trait.CUTS


class TakenOut:
    """What may be taken out behind a head.

    Args:
      product: of the head.
      logits: values that hold its logits as they are.
    """

    def __init__(self, product: Node, logits: Collection[Value]) -> None:
        self._product, self._logits = product, logits
        self._counts: dict[Node, tuple[int, float]] = {}

    @property
    def at_most(self) -> int:
        """How many, whatever loops carry on from one iteration to the next."""
        return sum(most for most, _ in self._counts.values())

    @property
    def behind(self) -> float:
        """How many of the logits that are made at once; infinity if a loop behind them takes out as
        many as it likes."""
        return sum(behind for _, behind in self._counts.values())

    def add(self, user: Node, count: int) -> None:
        """Remember that so many logits of a token may be taken out."""
        looped = user.scope.parent is not None  # others each time, in a loop
        most = math.prod(user.outs[0].shape) if looped else count
        self._counts[user] = most, count * self._times(user)

    def _times(self, user: Node) -> float:
        """How often an operation runs each time the logits are made."""
        around = list(self._product.scope.ancestors())
        behind = (scope for scope in user.scope.ancestors() if scope not in around)
        return math.prod(math.inf if s.length is None else float(s.length) for s in behind)

    def by_scatter(self, user: Node, axis: int) -> bool:
        """Whether a scatter makes a few logits less or leaves them: the greatest of the others stay
        what they are."""
        count = math.prod(user.ins[1].shape[:-1]) * _written(user, axis)
        if count > _FEW:
            return False
        made = origin(user.ins[2], Trait.CASTS | Trait.MOVES)
        chosen = made.node is not None and made.node.primitive is p.select_n_p
        cases = made.node.ins[1:] if made.node is not None and chosen else (made,)
        adds = user.primitive is p.scatter_add_p
        lowers = (adds or user.primitive is p.scatter_p) and all(
            self._lowers(case, 0.0 if adds else -1e4, adds) for case in cases
        )
        if lowers:
            self.add(user, count)
        return lowers

    def _lowers(self, update: Value, most: float, adds: bool) -> bool:
        """Whether an update is a number so small, or what it takes the place of."""
        source = origin(update, LAID)
        while not adds and source.node is not None and source.node.primitive is p.gather_p:
            source = origin(source.node.ins[0], LAID)
        if source.literal is not None:
            return float(np.max(np.asarray(source.literal))) <= most
        return not adds and source in self._logits


def _written(scatter: Node, axis: int) -> int:
    """How many numbers in a row a scatter writes along an axis for each of its indices."""
    numbers = scatter.params["dimension_numbers"]
    gone = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    if axis in gone:
        return 1
    before = sum(i not in gone for i in range(axis))
    return int(scatter.ins[2].shape[numbers.update_window_dims[before]])
