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
from jax.extend.core import primitives as p

from hire_rewrite.graph.nodes import Node, Value, source_of
from hire_rewrite.graph.traits import Trait, has, slope
from hire_rewrite.patterns.axes import origin, result_axis
from hire_rewrite.patterns.linear import is_one_hot
from hire_rewrite.sites.head.along import has_powers, is_normalized, is_random, varies
from hire_rewrite.sites.head.choices import DOWN, LOST, UP, Choices, Where
from hire_rewrite.sites.head.distortion import is_negative
from hire_rewrite.sites.head.flow import enter, leave, made_of
from hire_rewrite.sites.head.in_order import InOrder
from hire_rewrite.sites.head.logits import Walk
from hire_rewrite.sites.head.looked_up import decided_by, says_which
from hire_rewrite.sites.head.steps import is_stepped, may_level, searched_sum
from hire_rewrite.sites.head.taken_out import LAID, TakenOut

_RISING = frozenset(
    (p.log_p, p.log1p_p, p.exp2_p, p.expm1_p, p.sqrt_p, p.cbrt_p, p.sinh_p, p.asinh_p, p.atan_p,
     p.erf_p)
)  # fmt: skip
"""Functions that rise where they are defined, but for rounding."""


class Ranked(NamedTuple):
    """How what is ranked behind a head is made of its logits.

    Attributes:
      disorder: why its greatest may not be those of the greatest logits; None if they are.
      forbidden: how many of the greatest logits the program may take out of the order.
      rounding: the unit of the coarsest arithmetic between, which may make two logits one; 0.0
        where nothing is between.
      depth: how many of the greatest logits are asked for: by what searches them, what is read
        of them in order, and where those before are taken out.
    """

    disorder: str | None
    forbidden: int
    rounding: float
    depth: int


AS_LOGITS = Ranked(None, 0, 0.0, 1)
"""What is ranked is the logits themselves."""


def ranked(walk: Walk, outputs: Collection[tuple[Value, int]], inside: Collection[Node]) -> Ranked:
    """What is ranked behind a head.

    Args:
      walk: of the head's logits, which has found that something is.
      outputs: what its epilogue returns, each with its vocabulary axis.
      inside: the epilogue.
    """
    order = _Order(walk, inside)
    order.logits.update(origin(value, LAID) for value, _ in outputs)
    whole = jnp.issubdtype(walk.product.outs[0].dtype, jnp.integer)  # logits that are integers
    order.stack = [
        (value, axis, LOST if is_stepped(value) and not whole else UP) for value, axis in outputs
    ]
    while order.stack and order.reason is None:
        order.visit(*order.stack.pop())
        if not order.stack:
            order.doubt_choices()
    decides = None
    if order.reason is None:
        decides = decided_by(order.looked_up, {value for value, _ in order.ways}, walk.uses)
    if decides is not None:
        order.reason = (
            f"something is decided ({decides.primitive}, {source_of(decides)}) by logits that are "
            "looked up, or by a sum of some, and those may be none of the greatest"
        )
    taken = order.taken.behind
    if taken == math.inf:
        order.reason = "a loop behind it takes out as many of its greatest logits as it likes"
        return Ranked(order.reason, order.taken.at_most, order.rounding, 1)
    searched = (search.node.params.get("k", 1) for search in walk.found)
    depth = max([1, order.depth, *searched]) + int(taken)
    return Ranked(order.reason, order.taken.at_most, order.rounding, depth)


class _Order:
    """Forward from the outputs of a head, wherever their vocabulary goes."""

    def __init__(self, walk: Walk, inside: Collection[Node]) -> None:
        self.walk, self.inside, self.uses = walk, inside, walk.uses
        self.logits: set[Value] = set()
        self.stack: list[tuple[Value, int, int]] = []
        self.ways: dict[tuple[Value, int], int] = {}
        self.lost: dict[Value, Node] = {}
        self.choices: list[tuple[Node, int, int]] = []
        self.looked_up: list[Value] = []
        self.reason: str | None = None
        self.taken = TakenOut(walk.product, self.logits)
        self.depth = 0
        self.rounding = 0.0
        self.of_logits = made_of(walk.product, walk.uses)

    def visit(self, value: Value, axis: int, way: int) -> None:
        if value.shape[axis] == 1:
            self._look_up(value, value.node.ins[0] if value.node is not None else value)
            return
        known = self.ways.get((value, axis))
        if known in (way, LOST):
            return
        if known is not None:  # both ways round, from iteration to iteration
            way = LOST
        self.ways[value, axis] = way
        if value in self.uses.results:
            self._pass_on(value, leave(value, axis), way)
            returned = jnp.issubdtype(value.dtype, jnp.floating) or is_stepped(value)
            if value.scope.parent is None and returned and way != UP:
                self._refuse(value, way, "they are returned")
        for user, position in self.uses.users(value):
            if user in self.inside:
                continue
            if user.bodies:
                self._pass_on(value, enter(user, value, axis), way)
                continue
            behind = self.walk.behind(user, position, axis)
            if not behind:
                self._consumed(user, value, axis, way)
                continue
            chooses = user.primitive is p.select_n_p and position == 0
            there = self._way(user, position, axis) if way != LOST or chooses else LOST
            if there is None:
                continue
            for out, place in behind:
                if there == LOST:
                    self.lost.setdefault(out, self.lost.get(value, user))
                self.stack.append((out, place, way * there))

    def _pass_on(self, value: Value, places: Collection[tuple[Value, int]], way: int) -> None:
        """Go on where a value enters or leaves a body."""
        for there, axis in places:
            if value in self.lost:
                self.lost.setdefault(there, self.lost[value])
            self.stack.append((there, axis, way))

    def doubt_choices(self) -> None:
        """Give up the order behind choices that leave out what is great: all conditions can be
        told when all values have been seen."""
        conditions = Choices(self._known_way, self.of_logits)
        for user, position, axis in self.choices:
            way = self.ways[user.ins[position], axis]
            kept = conditions.kept(user, position, axis)
            (out,) = user.outs
            if kept is Where.OTHERS:
                self.taken.add(user, 1)
            elif kept not in (Where.ALL, Where.RANKS, Where.GREAT) and way != LOST:
                self.lost.setdefault(out, user)
                self.stack.append((out, axis, LOST))
        self.choices.clear()

    def _known_way(self, value: Value) -> int | None:
        ways = {self.ways[value, i] for i in range(len(value.shape)) if (value, i) in self.ways}
        return ways.pop() if len(ways) == 1 else LOST if ways else None

    def _consumed(self, user: Node, value: Value, axis: int, way: int) -> None:
        """An operation is the end of the axis."""
        wanted: tuple[int, ...] = (UP, DOWN)
        if has(user.primitive, Trait.REDUCES) and user.outs[0].shape == value.shape:
            self.lost.setdefault(user.outs[0], user)  # sums of all before
            self.stack.append((user.outs[0], axis, LOST))
            return
        if has(user.primitive, Trait.REDUCES) and way == LOST and is_stepped(value):
            wanted = ()
        elif user.primitive is p.reduce_sum_p and self._is_of_some(value, axis):
            self.looked_up.append(user.outs[0])
            return
        elif user.primitive in (p.reduce_p, p.reduce_prod_p):
            self.looked_up += user.outs
            return
        elif user.primitive is p.reduce_min_p or user.params.get("is_max_k") is False:
            wanted = (DOWN,)
        elif user.primitive is p.reduce_max_p or has(user.primitive, Trait.SEARCHES):
            wanted = (UP,)
        elif not has(user.primitive, Trait.ORDERS):
            if user.primitive in (p.gather_p, p.dot_general_p):
                known = self._look_up(user.outs[0], value)
                stepped = not known and is_stepped(origin(value, Trait.CASTS | Trait.MOVES))
                if way == LOST and (stepped or searched_sum(value, self.lost.get(value))):
                    self._refuse(value, way, f"{user.primitive} searches them ({source_of(user)})")
            return
        if user.primitive is p.sort_p:
            wanted = self._wanted_of_sorted(user, value, axis, way)
        if way not in wanted:
            self._refuse(value, way, f"{user.primitive} ranks them ({source_of(user)})")

    def _wanted_of_sorted(self, user: Node, value: Value, axis: int, way: int) -> tuple[int, ...]:
        """The ways in which numbers may be sorted: those for which their least ones are not seen to
        be read. How many of the greatest are is remembered."""
        if user.ins[0] is not value:
            return ()
        read = InOrder(user, axis, self.uses, self.of_logits)
        self.looked_up += read.looked_up
        wanted = {UP, DOWN}
        for part, start, limit, size, tokens in read.parts:
            if start == 0 and limit < size:
                wanted.discard(UP)
            elif start > 0 and limit == size:
                wanted.discard(DOWN)
            depth = size - start if way == UP else limit  # numbers ascend
            if tokens or 2 * depth <= size:
                self.depth = max(self.depth, depth)
            else:
                self.looked_up.append(part)
        if read.unknown is not None:
            self.reason = (
                "its logits are put in order, and what is read at a rank that is not known before "
                f"({source_of(read.unknown)}) may be none of the greatest"
            )
        return tuple(wanted)

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
            return UP if position == 2 or self.taken.by_scatter(user, axis) else LOST
        if primitive is p.dot_general_p:
            return UP if is_one_hot(user.ins[1 - position]) else LOST
        if not has(primitive, Trait.POINTWISE):
            there = result_axis(user, position, axis)
            cut = there is not None and 1 < user.outs[0].shape[there[0]] < size[axis]
            return LOST if cut else UP  # a part, or it lies elsewhere
        self._round(user, position)
        if primitive is p.select_n_p and position == 0:  # what it keeps is told where that is met
            return None if any(case in self.of_logits for case in user.ins[1:]) else LOST
        if not jnp.issubdtype(user.outs[0].dtype, jnp.floating):
            return LOST if is_stepped(user.outs[0]) else None
        others = [other for i, other in enumerate(user.ins) if i != position]
        if primitive is p.select_n_p:
            cases = user.ins[1:]
            self.choices.append((user, position, axis))
            alike = all(self._is_alike(case, user.ins[position], axis) for case in cases)
            return UP if alike else LOST
        if any(varies(other, axis) and not is_random(other) for other in others):
            return LOST
        normalized = is_normalized(user.ins[position], self.walk.product, self.of_logits)
        chances = size[axis] if normalized else None
        if may_level(user, position, others, chances):
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

    def _look_up(self, some: Value, logits: Value) -> bool:
        """Remember some logits of each token, unless the logits say which; whether they do."""
        made = some.node
        others = [v for v in made.ins if v is not logits] if made is not None else []
        known = any(says_which(other, self.of_logits) for other in others)
        if not known:
            self.looked_up.append(some)
        return known

    def _is_of_some(self, value: Value, axis: int) -> bool:
        """Whether only some numbers are left, which the logits do not say, or all count alike, and
        not the greatest most."""
        if not has_powers(value, self.walk.product, self.of_logits):
            return True
        source = origin(value, LAID)
        blamed = self.lost.get(value)
        changed = [blamed] if blamed is not None else []
        made = source.node
        if made is not None and made in self.inside and made.primitive is not p.exp_p:
            changed += self.inside
        if any(has(node.primitive, Trait.SCATTERS | Trait.CUTS) for node in changed):
            return True
        others = (v for node in changed for v in node.ins if v not in self.of_logits)
        return any(varies(other, axis) for other in others)


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
