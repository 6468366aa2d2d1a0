"""Whether what is ranked behind a head has the order of its logits.

A head computes the greatest logits exactly and guesses the others. That is what the dense head does
if whoever looks for the greatest finds them among these: after a softmax, say, or a temperature.
It is not if the order is another one by then: of negated logits, of squares, of what the logits of
two models have in common, of some that were looked up, after a bias for some tokens. (What treats
each logit by itself before any of this is no matter: candidates are chosen by what it returns.)
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives as p

from hire_rewrite.graph.nodes import Node, Value, source_of
from hire_rewrite.graph.provenance import backward_slice, body_of
from hire_rewrite.graph.traits import Trait, has, slope
from hire_rewrite.patterns.axes import origin
from hire_rewrite.patterns.linear import is_one_hot
from hire_rewrite.sites.head.distortion import is_negative
from hire_rewrite.sites.head.logits import Walk, downstream, enter, leave

_RISING = frozenset(
    (p.log_p, p.log1p_p, p.exp2_p, p.expm1_p, p.sqrt_p, p.cbrt_p, p.sinh_p, p.asinh_p, p.atan_p,
     p.erf_p)
)  # fmt: skip
"""Functions that rise where they are defined, but for rounding."""

_FEW = 16
"""Tokens that a program may forbid one by one: of 64 exact logits enough are left."""

_LAID = Trait.CASTS | Trait.MOVES | Trait.CUTS

_UP, _DOWN, _LOST = 1, -1, 0
"""How values are ordered along the vocabulary: as the logits are, the other way round, or not."""


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
    order.stack = [(value, axis, _UP) for value, axis in outputs]
    while order.stack and order.reason is None:
        order.visit(*order.stack.pop())
    return Ranked(order.reason, sum(order.forbidden.values()), order.rounding)


class _Order:
    """Forward from the outputs of a head, wherever their vocabulary goes."""

    def __init__(self, walk: Walk, inside: Collection[Node]) -> None:
        self.walk, self.inside, self.uses = walk, inside, walk.uses
        self.logits: set[Value] = set()
        self.stack: list[tuple[Value, int, int]] = []
        self.ways: dict[tuple[Value, int], int] = {}
        self.lost: dict[Value, Node] = {}
        self.reason: str | None = None
        self.forbidden: dict[Node, int] = {}
        self.rounding = 0.0
        self.of_logits = downstream([walk.product], walk.uses)

    def visit(self, value: Value, axis: int, way: int) -> None:
        if value.shape[axis] == 1:
            return  # a single one that was looked up
        known = self.ways.get((value, axis))
        if known in (way, _LOST):
            return
        if known is not None:  # both ways round, from iteration to iteration
            way = _LOST
        self.ways[value, axis] = way
        if value in self.uses.results:
            outside = leave(value, axis)
            self.stack += ((*there, way) for there in outside)
            floating = jnp.issubdtype(value.dtype, jnp.floating)
            if value.scope.parent is None and floating and way != _UP:
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
            there = self._way(user, position, axis) if way != _LOST else _LOST
            if there is None:
                continue
            for out, place in behind:
                if there == _LOST:
                    self.lost.setdefault(out, self.lost.get(value, user))
                self.stack.append((out, place, way * there))

    def _consumed(self, user: Node, value: Value, axis: int, way: int) -> None:
        """An operation is the end of the axis."""
        wanted: tuple[int, ...] = (_UP, _DOWN)
        if user.primitive is p.reduce_min_p or user.params.get("is_max_k") is False:
            wanted = (_DOWN,)
        elif user.primitive is p.reduce_max_p or has(user.primitive, Trait.SEARCHES):
            wanted = (_UP,)
        elif not has(user.primitive, Trait.ORDERS):
            several = user.primitive is p.gather_p and _picks(user, value, axis) != 1
            if several and self._is_ranked(user.outs[0]):
                self.reason = (
                    f"several of its logits are looked up and ranked ({source_of(user)}), and "
                    "those may be none of the greatest"
                )
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
                        found.add(_UP)
                    elif not short and start > 0:
                        found.add(_DOWN)
        return found

    def _refuse(self, value: Value, way: int, why: str) -> None:
        blamed = self.lost.get(value)
        what = f"changed by {blamed.primitive} ({source_of(blamed)})" if blamed else "turned round"
        if way == _UP:
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
            return _UP if alone or primitive is p.reduce_max_p else _LOST
        if has(primitive, Trait.SCATTERS):
            return _UP if position == 2 or self._forbids(user) else _LOST
        if primitive is p.dot_general_p:
            return _UP if is_one_hot(user.ins[1 - position]) else _LOST
        if not has(primitive, Trait.POINTWISE):
            return _UP  # it lies elsewhere
        self._round(user, position)
        if not jnp.issubdtype(user.outs[0].dtype, jnp.floating):
            return None  # a condition
        others = [other for i, other in enumerate(user.ins) if i != position]
        if primitive is p.select_n_p:
            condition, *cases = user.ins
            if position == 0:
                return None
            masks = _varies(condition, axis) and condition not in self.of_logits
            masks |= self._drops_the_greatest(condition, cases, user.ins[position])
            alike = all(self._is_alike(case, user.ins[position], axis) for case in cases)
            return _LOST if masks or not alike else _UP
        if any(_varies(other, axis) and not _is_random(other) for other in others):
            return _LOST
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

    def _drops_the_greatest(self, condition: Value, cases: Sequence[Value], kept: Value) -> bool:
        """Whether a choice that compares the logits themselves leaves out the great ones, or those
        that are equal to something."""
        made = origin(condition, _LAID).node
        if made is None or len(cases) != 2:
            return False
        if made.primitive is p.not_p:
            return self._drops_the_greatest(made.ins[0], cases[::-1], kept)
        compared = [origin(value, _LAID) is origin(kept, _LAID) for value in made.ins]
        if not has(made.primitive, Trait.COMPARES) or compared.count(True) != 1:
            return False
        if made.primitive in (p.eq_p, p.ne_p):
            other = origin(made.ins[compared.index(False)], _LAID)
            return other.literal is None
        # True where the logits are great: that case has to be theirs.
        great = (made.primitive in (p.gt_p, p.ge_p)) == compared[0]
        return cases[great] is not kept

    def _is_alike(self, case: Value, other: Value, axis: int) -> bool:
        """Whether a case of a choice is ordered as another one is, or is one number."""
        if case is other or not _varies(case, axis):
            return True
        ways = self.ways.get((case, axis)), self.ways.get((other, axis))
        return (ways[0] is None and case in self.of_logits) or ways[0] == ways[1]

    def _forbids(self, user: Node) -> bool:
        """Whether a scatter makes a few logits less or leaves them: the greatest of the others stay
        what they are."""
        count = math.prod(user.ins[1].shape[:-1])
        if count > _FEW:
            return False
        made = origin(user.ins[2], Trait.CASTS | Trait.MOVES)
        chosen = made.node is not None and made.node.primitive is p.select_n_p
        cases = made.node.ins[1:] if made.node is not None and chosen else (made,)
        adds = user.primitive is p.scatter_add_p
        lowers = (adds or user.primitive is p.scatter_p) and all(
            self._lowers(case, 0.0 if adds else -1e4, adds) for case in cases
        )
        if lowers:  # others each time, in a loop
            looped = user.scope.parent is not None
            self.forbidden[user] = math.prod(user.outs[0].shape) if looped else count
        return lowers

    def _lowers(self, update: Value, most: float, adds: bool) -> bool:
        """Whether an update is a number so small, or what it takes the place of."""
        source = origin(update, _LAID)
        while not adds and source.node is not None and source.node.primitive is p.gather_p:
            source = origin(source.node.ins[0], _LAID)
        if source.literal is not None:
            return float(np.max(np.asarray(source.literal))) <= most
        return not adds and source in self.logits

    def _is_ranked(self, value: Value) -> bool:
        """Whether numbers are soon ranked."""
        seen, stack = {value}, [value]
        while stack and len(seen) < 64:
            for user, _ in self.uses.users(stack.pop()):
                if has(user.primitive, Trait.SEARCHES | Trait.ORDERS):
                    return True
                new = {v for v in user.outs if jnp.issubdtype(v.dtype, jnp.floating)} - seen
                if not user.bodies and not has(user.primitive, Trait.REDUCES):
                    seen |= new
                    stack += new
        return False


def _picks(user: Node, value: Value, axis: int) -> int:
    """How many logits a gather looks up for each token."""
    sizes = list(user.outs[0].shape)
    for i, size in enumerate(value.shape):
        if i != axis and size in sizes:
            sizes.remove(size)
    return math.prod(sizes)


def _way_of(user: Node, position: int, others: Collection[Value]) -> int:
    """How the result of one operation on each number is ordered."""
    primitive = user.primitive
    if primitive is p.integer_pow_p:
        return _UP if user.params["y"] % 2 and user.params["y"] > 0 else _LOST
    if primitive in _RISING:
        return _UP
    # Of probabilities a power rises or falls as its exponent says.
    kind = "?" if primitive is p.pow_p and position == 0 else slope(primitive, position)
    if kind == "?":
        return _DOWN if any(map(is_negative, others)) else _UP
    return {"+": _UP, "-": _DOWN}.get(kind, _LOST)


def _varies(value: Value, axis: int, depth: int = 16) -> bool:
    """Whether numbers may differ along an axis."""
    if value.literal is not None or axis >= len(value.shape) or value.shape[axis] == 1:
        return False
    if value.is_input and value.scope.parent is not None:
        body, i = body_of(value)
        sliced = body.inputs[i].role == "slice"
        return body.inputs[i].role == "carry" or _varies(body.inputs[i].outer, axis + sliced, depth)
    node = value.node
    if node is None or node.bodies or depth == 0:
        return True
    if node.primitive is p.broadcast_in_dim_p:
        places = list(node.params["broadcast_dimensions"])
        return axis in places and _varies(node.ins[0], places.index(axis), depth - 1)
    if node.primitive is p.iota_p:
        return bool(node.params["dimension"] == axis)
    if has(node.primitive, Trait.POINTWISE):
        return any(_varies(operand, axis, depth - 1) for operand in node.ins)
    return True


def _is_random(value: Value) -> bool:
    """Whether it is random numbers, and nothing that a model computes: what is drawn is drawn by
    guesses, too."""
    made = [each.node for each in backward_slice(value)]
    drawn = any(node is not None and has(node.primitive, Trait.RANDOM) for node in made)
    return drawn and not any(
        node is not None and has(node.primitive, Trait.MULTIPLIES) for node in made
    )
