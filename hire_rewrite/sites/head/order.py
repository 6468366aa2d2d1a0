"""Whether what is ranked behind a head has the order of its logits.

A head computes the greatest logits exactly and guesses the others. That is what the dense head does
if whoever looks for the greatest finds them among these: after a softmax, say, or a temperature.
It is not if the order is another one by then: of negated logits, of squares, of what the logits of
two models have in common, of some that were looked up, after a bias for some tokens. (What treats
each logit by itself before any of this is no matter: candidates are chosen by what it returns.)
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives as p

from hire_rewrite.graph.nodes import Node, Value, source_of
from hire_rewrite.graph.traits import Trait, has, slope
from hire_rewrite.patterns.axes import origin, result_axis
from hire_rewrite.patterns.linear import is_one_hot
from hire_rewrite.sites.head.along import is_random, varies
from hire_rewrite.sites.head.choices import DOWN, LOST, UP, Choices, Where
from hire_rewrite.sites.head.distortion import is_negative
from hire_rewrite.sites.head.logits import Walk, downstream, enter, leave
from hire_rewrite.sites.head.looked_up import are_ranked, compared_lookups, picks

_RISING = frozenset(
    (p.log_p, p.log1p_p, p.exp2_p, p.expm1_p, p.sqrt_p, p.cbrt_p, p.sinh_p, p.asinh_p, p.atan_p,
     p.erf_p)
)  # fmt: skip
"""Functions that rise where they are defined, but for rounding."""

_FEW = 16
"""Tokens that a program may forbid one by one: of 64 exact logits enough are left."""

_LAID = Trait.CASTS | Trait.MOVES | Trait.CUTS


class Ranked(NamedTuple):
    """How what is ranked behind a head is made of its logits.

    Attributes:
      disorder: why its greatest may not be those of the greatest logits; None if they are.
      forbidden: how many of the greatest logits the program may take out of the order.
      rounding: the unit of the coarsest arithmetic between, which may make two logits one; 0.0
        where nothing is between.
    """

    disorder: str | None
    forbidden: int
    rounding: float


AS_LOGITS = Ranked(None, 0, 0.0)
"""What is ranked is the logits themselves."""


def ranked(walk: Walk, outputs: Collection[tuple[Value, int]], inside: Collection[Node]) -> Ranked:
    """What is ranked behind a head.

    Args:
      walk: of the head's logits, which has found that something is.
      outputs: what its epilogue returns, each with its vocabulary axis.
      inside: the epilogue.
    """
    order = _Order(walk, inside)
    order.logits = {origin(value, _LAID) for value, _ in outputs}
    order.stack = [(value, axis, UP) for value, axis in outputs]
    while order.stack and order.reason is None:
        order.visit(*order.stack.pop())
        if not order.stack:
            order.doubt_choices()
    compared = compared_lookups(order.singles, walk.uses) if order.reason is None else None
    if compared is not None:
        order.refuse_lookups(compared)
    return Ranked(order.reason, sum(order.forbidden.values()), order.rounding)


class _Order:
    """Forward from the outputs of a head, wherever their vocabulary goes."""

    def __init__(self, walk: Walk, inside: Collection[Node]) -> None:
        self.walk, self.inside, self.uses = walk, inside, walk.uses
        self.logits: set[Value] = set()
        self.stack: list[tuple[Value, int, int]] = []
        self.ways: dict[tuple[Value, int], int] = {}
        self.lost: dict[Value, Node] = {}
        self.choices: list[tuple[Node, int, int]] = []
        self.singles: list[Value] = []
        self.reason: str | None = None
        self.forbidden: dict[Node, int] = {}
        self.rounding = 0.0
        self.of_logits = downstream([walk.product], walk.uses)

    def visit(self, value: Value, axis: int, way: int) -> None:
        if value.shape[axis] == 1:
            self._look_up(value)
            return
        known = self.ways.get((value, axis))
        if known in (way, LOST):
            return
        if known is not None:  # both ways round, from iteration to iteration
            way = LOST
        self.ways[value, axis] = way
        if value in self.uses.results:
            outside = leave(value, axis)
            self.stack += ((*there, way) for there in outside)
            floating = jnp.issubdtype(value.dtype, jnp.floating)
            if value.scope.parent is None and floating and way != UP:
                self._refuse(value, way, "they are returned")
        for user, position in self.uses.users(value):
            if user in self.inside:
                continue
            if user.bodies:
                self.stack += ((*there, way) for there in enter(user, value, axis))
                continue
            behind = self.walk.behind(user, position, axis)
            if not behind:
                self._consumed(user, value, axis, way)
                continue
            there = self._way(user, position, axis) if way != LOST else LOST
            if there is None:
                continue
            for out, place in behind:
                if there == LOST:
                    self.lost.setdefault(out, self.lost.get(value, user))
                self.stack.append((out, place, way * there))

    def doubt_choices(self) -> None:
        """Give up the order behind choices that leave out what is great: all conditions can be
        told when all values have been seen."""
        conditions = Choices(self._known_way, self.of_logits)
        for user, position, axis in self.choices:
            way = self.ways[user.ins[position], axis]
            kept = conditions.kept(user, position, axis)
            (out,) = user.outs
            if kept is Where.OTHERS:
                self._forbid(user, 1)
            elif kept not in (Where.ALL, Where.RANKS, Where.GREAT) and way != LOST:
                self.lost.setdefault(out, user)
                self.stack.append((out, axis, LOST))
        self.choices.clear()

    def _known_way(self, value: Value) -> int | None:
        ways = {self.ways[value, i] for i in range(len(value.shape)) if (value, i) in self.ways}
        return ways.pop() if len(ways) == 1 else LOST if ways else None

    def _forbid(self, user: Node, count: int) -> None:
        """Remember that so many logits of a token may be taken out."""
        looped = user.scope.parent is not None  # others each time, in a loop
        self.forbidden[user] = math.prod(user.outs[0].shape) if looped else count

    def _consumed(self, user: Node, value: Value, axis: int, way: int) -> None:
        """An operation is the end of the axis."""
        wanted: tuple[int, ...] = (UP, DOWN)
        if user.primitive is p.reduce_min_p or user.params.get("is_max_k") is False:
            wanted = (DOWN,)
        elif user.primitive is p.reduce_max_p or has(user.primitive, Trait.SEARCHES):
            wanted = (UP,)
        elif not has(user.primitive, Trait.ORDERS):
            if user.primitive is p.gather_p:
                if picks(user, value, axis) == 1:
                    self._look_up(user.outs[0])
                elif are_ranked(user.outs[0], self.uses):
                    self.refuse_lookups(user)
            return
        if user.primitive is p.sort_p:
            wanted = tuple(way for way in wanted if way not in self._read_ends(user, axis))
        if way not in wanted:
            self._refuse(value, way, f"{user.primitive} ranks them ({source_of(user)})")

    def _read_ends(self, user: Node, axis: int) -> set[int]:
        """Of numbers in ascending order the ways for which their least ones are seen to be read:
        those of which the first are, or the last, and no others."""
        found = set()
        for out in user.outs:
            for reader, _ in self.uses.users(out):
                if reader.primitive is p.slice_p:
                    start = reader.params["start_indices"][axis]
                    short = reader.params["limit_indices"][axis] < out.shape[axis]
                    if short and start == 0:
                        found.add(UP)
                    elif not short and start > 0:
                        found.add(DOWN)
        return found

    def _refuse(self, value: Value, way: int, why: str) -> None:
        blamed = self.lost.get(value)
        what = f"changed by {blamed.primitive} ({source_of(blamed)})" if blamed else "turned round"
        if way == UP:
            what = "the logits'"
        self.reason = (
            f"its logits are exact where they are greatest, and {why} in an order that is {what}"
        )

    def _way(self, user: Node, position: int, axis: int) -> int | None:
        """How the order of a result is that of an operand; None if its numbers are not followed."""
        primitive, size = user.primitive, user.ins[position].shape
        if has(primitive, Trait.REDUCES | Trait.ORDERS):
            gone = user.params.get("axes", ())
            alone = all(size[i] == 1 for i in gone) and bool(gone)
            return UP if alone or primitive is p.reduce_max_p else LOST
        if has(primitive, Trait.SCATTERS):
            return UP if position == 2 or self._forbids(user, axis) else LOST
        if primitive is p.dot_general_p:
            return UP if is_one_hot(user.ins[1 - position]) else LOST
        if not has(primitive, Trait.POINTWISE):
            there = result_axis(user, position, axis)
            cut = there is not None and 1 < user.outs[0].shape[there[0]] < size[axis]
            return LOST if cut else UP  # a part, or it lies elsewhere
        self._round(user, position)
        if not jnp.issubdtype(user.outs[0].dtype, jnp.floating):
            return None  # a condition
        others = [other for i, other in enumerate(user.ins) if i != position]
        if primitive is p.select_n_p:
            if position == 0:
                return None
            cases = user.ins[1:]
            self.choices.append((user, position, axis))
            alike = all(self._is_alike(case, user.ins[position], axis) for case in cases)
            return UP if alike else LOST
        if any(varies(other, axis) and not is_random(other) for other in others):
            return LOST
        return _way_of(user, position, others)

    def _round(self, user: Node, position: int) -> None:
        """Remember an operation that may make two numbers one."""
        before, after = user.ins[position].dtype, user.outs[0].dtype
        if not jnp.issubdtype(after, jnp.floating) or user.primitive is p.select_n_p:
            return
        unit = float(jnp.finfo(after).eps)
        if has(user.primitive, Trait.CASTS) and unit <= float(jnp.finfo(before).eps):
            return
        self.rounding = max(self.rounding, unit)

    def _is_alike(self, case: Value, other: Value, axis: int) -> bool:
        """Whether a case of a choice is ordered as another one is, or is one number."""
        if case is other or not varies(case, axis):
            return True
        ways = self.ways.get((case, axis)), self.ways.get((other, axis))
        return (ways[0] is None and case in self.of_logits) or ways[0] == ways[1]

    def _forbids(self, user: Node, axis: int) -> bool:
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
            self._forbid(user, count)
        return lowers

    def _lowers(self, update: Value, most: float, adds: bool) -> bool:
        """Whether an update is a number so small, or what it takes the place of."""
        source = origin(update, _LAID)
        while not adds and source.node is not None and source.node.primitive is p.gather_p:
            source = origin(source.node.ins[0], _LAID)
        if source.literal is not None:
            return float(np.max(np.asarray(source.literal))) <= most
        return not adds and source in self.logits

    def _look_up(self, single: Value) -> None:
        """Remember a single logit of each token, unless the logits say which."""
        made = single.node
        if made is not None and not any(v in self.of_logits for v in made.ins[1:]):
            self.singles.append(single)

    def refuse_lookups(self, user: Node) -> None:
        self.reason = (
            f"several of its logits are looked up and ranked ({source_of(user)}), and those may be "
            "none of the greatest"
        )


def _written(scatter: Node, axis: int) -> int:
    """How many numbers in a row a scatter writes along an axis for each of its indices."""
    numbers = scatter.params["dimension_numbers"]
    gone = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    if axis in gone:
        return 1
    before = sum(i not in gone for i in range(axis))
    return int(scatter.ins[2].shape[numbers.update_window_dims[before]])


def _way_of(user: Node, position: int, others: Collection[Value]) -> int:
    """How the result of one operation on each number is ordered."""
    primitive = user.primitive
    if primitive is p.integer_pow_p:
        return UP if user.params["y"] % 2 and user.params["y"] > 0 else LOST
    if primitive in _RISING:
        return UP
    # Of probabilities a power rises or falls as its exponent says.
    kind = "?" if primitive is p.pow_p and position == 0 else slope(primitive, position)
    if kind == "?":
        return DOWN if any(map(is_negative, others)) else UP
    return {"+": UP, "-": DOWN}.get(kind, LOST)
