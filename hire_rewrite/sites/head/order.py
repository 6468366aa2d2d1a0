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
from hire_rewrite.graph.traits import Trait, has
from hire_rewrite.patterns.axes import origin
from hire_rewrite.patterns.refusal import NoMatch
from hire_rewrite.sites.head.along import varies
from hire_rewrite.sites.head.chances import Powers, is_fill
from hire_rewrite.sites.head.choices import Choices, Where
from hire_rewrite.sites.head.flow import enter, leave, made_of
from hire_rewrite.sites.head.in_order import InOrder
from hire_rewrite.sites.head.logits import Walk
from hire_rewrite.sites.head.looked_up import decided_by, index_along, says_which
from hire_rewrite.sites.head.ranks import Ranks
from hire_rewrite.sites.head.steps import is_stepped, may_level
from hire_rewrite.sites.head.taken_out import LAID, TakenOut
from hire_rewrite.sites.head.ways import DOWN, LOST, UP, is_noise, way_moved, way_of_each


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
            order.judge()
    decides = None
    if order.reason is None:
        order.add_up()
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
    """Forward from the outputs of a head, wherever their vocabulary goes.

    Attributes:
      ways: how values are ordered along an axis, as far as that was followed.
      in_order: those of them that were sorted.
      lost: where the order of a value was lost.
      choices: operands of a `select_n`, each with its axis, that are judged at last.
      sums: over an axis of a value.
      looked_up: numbers that may be guesses.
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
        self.looked_up: list[Value] = []
        self.reason: str | None = None
        self.taken = TakenOut(walk.product, self.logits)
        self.depth = 0
        self.rounding = 0.0
        self.of_logits = made_of(walk.product, walk.uses)
        self.powers = Powers(walk.product, self.of_logits)
        self.ranks = Ranks(self.powers, self.of_logits)

    def visit(self, value: Value, axis: int, way: int) -> None:
        known = self.ways.get((value, axis))
        if known in (way, LOST):
            return
        if value.shape[axis] == 1:
            self._keep_looked_up(value, value, way)
            return
        if known is not None:  # both ways round, from iteration to iteration
            way = LOST
        self.ways[value, axis] = way
        if value in self.uses.results:
            self._pass_on(value, leave(value, axis), way)
            judged = jnp.issubdtype(value.dtype, jnp.floating) or self._is_stepped(value)
            if value.scope.parent is None and judged and way != UP:
                self._refuse(value, way, "they are returned")
        for user, position in self.uses.users(value):
            if user in self.inside:
                continue
            if user.bodies:
                self._pass_on(value, enter(user, value, axis), way)
            elif value in self.in_order and self._is_known_of_ranks(user, position):
                continue
            else:
                self._used(user, position, axis, way)

    def _used(self, user: Node, position: int, axis: int, way: int) -> None:
        """Go on behind one operation."""
        value = user.ins[position]
        sorted_ = value in self.in_order
        try:
            behind = self.walk.behind(user, position, axis)
        except NoMatch as refused:
            self.reason = f"its logits are put in order, and {refused.reason}"
            return
        if not behind:
            self._consumed(user, position, axis, way)
            return
        chooses = user.primitive is p.select_n_p and position == 0
        there = self._way(user, position, axis) if way != LOST or chooses else LOST
        if there is None:
            return
        for out, place in behind:
            if sorted_ and out.shape[place] < value.shape[axis]:
                continue  # what is read of them was told where they were sorted
            if sorted_ and (user.primitive is p.rev_p or not has(user.primitive, Trait.EXTENDS)):
                self.in_order.add(out)
            if there == LOST:
                self.lost.setdefault(out, self.lost.get(value, user))
            self.stack.append((out, place, way * there))

    def _pass_on(self, value: Value, places: Collection[tuple[Value, int]], way: int) -> None:
        """Go on where a value enters or leaves a body."""
        for there, axis in places:
            if value in self.lost:
                self.lost.setdefault(there, self.lost[value])
            if value in self.in_order:
                self.in_order.add(there)
            self.stack.append((there, axis, way))

    def _is_known_of_ranks(self, user: Node, position: int) -> bool:
        """Whether an operation on sorted numbers is about their ranks, or puts them back."""
        if has(user.primitive, Trait.SCATTERS):
            return position == 2 and self.ranks.went_into(user.ins[1])
        if user.primitive is p.sort_p and position > 0:
            return self.ranks.went_into(user.ins[0])
        if self.ranks.is_sum_of_the_greatest(user):
            return True
        others = [v for i, v in enumerate(user.ins) if i != position and v in self.of_logits]
        each = has(user.primitive, Trait.POINTWISE) and user.primitive is not p.select_n_p
        return each and any(map(self.ranks.went_into, others))

    def judge(self) -> None:
        """Give up the order behind choices that leave out what is great: all conditions can be
        told when all values have been seen."""
        conditions = Choices(self._known_way, self.ranks)
        for user, position, axis in self.choices:
            value, (out,) = user.ins[position], user.outs
            way = self.ways[value, axis]
            kept = conditions.kept(user, position, axis, value in self.in_order)
            others = [case for i, case in enumerate(user.ins) if i not in (0, position)]
            fine = kept is Where.ALL
            if kept is Where.OTHERS:
                self.taken.add(user, 1)
                fine = True
            elif kept in (Where.RANKS, Where.GREAT):
                fine = all(is_fill(case, way, self.powers.sign(value)) for case in others)
            if not fine and way != LOST:
                self.lost.setdefault(out, user)
                self.stack.append((out, axis, LOST))
        self.choices.clear()

    def add_up(self) -> None:
        """Tell which sums along the vocabulary are sums of guesses."""
        for user, value, axis in self.sums:
            way = self.ways[value, axis]
            near = way != LOST and way == self.powers.sign(value) and not self._is_part(value, axis)
            if not near and not self.powers.weigh(value, axis, self._rises):
                self.looked_up.append(user.outs[0])

    def _rises(self, value: Value) -> bool:
        return value.node in self.inside or self._known_way(value) == UP

    def _known_way(self, value: Value) -> int | None:
        ways = {self.ways[value, i] for i in range(len(value.shape)) if (value, i) in self.ways}
        return ways.pop() if len(ways) == 1 else LOST if ways else None

    def _is_stepped(self, value: Value) -> bool:
        """Whether it is a decision about each logit, but for those about ranks, as of top p."""
        return is_stepped(value) and not self.ranks.went_into(value)

    def _consumed(self, user: Node, position: int, axis: int, way: int) -> None:
        """An operation is the end of the axis."""
        primitive, value = user.primitive, user.ins[position]
        why = f"{primitive} ranks them ({source_of(user)})"
        if primitive in (p.gather_p, p.dynamic_slice_p, p.dot_general_p):
            self._look_up(user, position, axis, way)
            return
        if has(primitive, Trait.REDUCES) and user.outs[0].shape == value.shape:
            self.lost.setdefault(user.outs[0], user)  # sums of all before
            self.stack.append((user.outs[0], axis, LOST))
            return
        wanted: tuple[int, ...] = (UP, DOWN)
        if has(primitive, Trait.REDUCES) and way == LOST and self._is_stepped(value):
            wanted = ()
        elif primitive is p.reduce_sum_p:
            self.sums.append((user, value, axis))
            return
        elif primitive in (p.reduce_p, p.reduce_prod_p):
            self.looked_up += user.outs
            return
        elif primitive is p.reduce_min_p or user.params.get("is_max_k") is False:
            wanted = (DOWN,)
        elif primitive is p.reduce_max_p or has(primitive, Trait.SEARCHES):
            wanted = (UP,)
        elif primitive is p.sort_p:
            wanted = self._wanted_of_sorted(user, value, axis, way)
        if way not in wanted:
            self._refuse(value, way, why)

    def _wanted_of_sorted(self, user: Node, value: Value, axis: int, way: int) -> tuple[int, ...]:
        """The ways in which numbers may be sorted: those for which their least ones are not seen to
        be read. How many of the greatest are is remembered."""
        if user.ins[0] is not value:
            return ()
        read = InOrder(user, axis, self.uses, self.of_logits)
        self.looked_up += read.looked_up
        for numbers, place in read.numbers:
            if numbers in user.outs:
                self.in_order.add(numbers)
            self.stack.append((numbers, place, way))
        for ranks, place, turned in read.ranks:
            self.ways.setdefault((ranks, place), -way if turned else way)
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
                "its logits are put in order, and what is read at a rank that is not known before, "
                f"or for each token in order ({source_of(read.unknown)}), may be none of the "
                "greatest"
            )
        elif any(self._is_returned(mask) for mask in read.masks):
            self._refuse(value, way, "it is returned which have some rank")
        return tuple(wanted)

    def _is_returned(self, mask: Value) -> bool:
        """Whether a condition about each token is a result of the function."""
        stack, seen = [mask], {mask}
        while stack:
            value = stack.pop()
            if value in self.uses.results and value.scope.parent is None:
                return True
            for user, _ in self.uses.users(value):
                moves = has(user.primitive, Trait.POINTWISE | Trait.MOVES | Trait.KEEPS)
                floating = jnp.issubdtype(user.outs[0].dtype, jnp.floating) if user.outs else True
                new = [out for out in user.outs if moves and not floating and out not in seen]
                stack += new
                seen.update(new)
        return False

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
        primitive, value = user.primitive, user.ins[position]
        if has(primitive, Trait.REDUCES | Trait.ORDERS):
            gone = user.params.get("axes", ())
            alone = all(value.shape[i] == 1 for i in gone) and bool(gone)
            return UP if alone or primitive is p.reduce_max_p else LOST
        if has(primitive, Trait.SCATTERS) and position == 0:
            return UP if self.taken.by_scatter(user, axis) else LOST
        if not has(primitive, Trait.POINTWISE):
            return way_moved(user, position, axis)
        self._round(user, position)
        if primitive is p.select_n_p and position == 0:  # what it keeps is told where that is met
            return None if any(case in self.of_logits for case in user.ins[1:]) else LOST
        if not jnp.issubdtype(user.outs[0].dtype, jnp.floating):
            return LOST if self._is_stepped(user.outs[0]) else None
        others = [other for i, other in enumerate(user.ins) if i != position]
        if primitive is p.select_n_p:
            self.choices.append((user, position, axis))
            alike = all(self._is_alike(case, value, axis) for case in user.ins[1:])
            return UP if alike else LOST
        if not all(is_noise(user, other, axis) for other in others):
            return LOST
        chances = value.shape[axis] if self.powers.is_normalized(value) else None
        if may_level(user, position, others, chances):
            return LOST
        return way_of_each(user, position, others, self.powers.sign(value))

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
        if case is other or not varies(case, axis) or case not in self.of_logits:
            return True
        ways = self.ways.get((case, axis)), self.ways.get((other, axis))
        return ways[0] is None or ways[0] == ways[1]

    def _look_up(self, user: Node, position: int, axis: int, way: int) -> None:
        """Some logits of each token are asked for, or what lies where they say."""
        value, (some,) = user.ins[position], user.outs
        if position > 0 and user.primitive is not p.dot_general_p:
            if self._is_stepped(value):
                self._refuse(value, way, f"{user.primitive} asks for them ({source_of(user)})")
            return
        index = user.ins[0] if position == 1 else index_along(user, axis)
        if not says_which(index, self.of_logits, value.shape[axis]):
            self._keep_looked_up(some, value, way)
            return
        for place, extent in enumerate(some.shape):  # all of them, in order
            if extent == value.shape[axis] and user.primitive is p.gather_p:
                self.in_order.add(some)
                self.stack.append((some, place, way))

    def _keep_looked_up(self, some: Value, logits: Value, way: int) -> None:
        """Remember some logits of each token, which may be guesses."""
        blamed = self.lost.get(logits)
        summed = blamed is not None and has(blamed.primitive, Trait.REDUCES)
        source = origin(logits, Trait.CASTS | Trait.MOVES | Trait.CUTS)
        searched = summed and not self.ranks.went_into(logits)
        if way == LOST and (searched or self._is_stepped(source)):
            self._refuse(logits, way, "some of them are looked up")
        self.looked_up.append(some)

    def _is_part(self, value: Value, axis: int) -> bool:
        """Whether only some numbers are left in the epilogue, which the logits do not say."""
        made = origin(value, LAID).node
        if made is None or made not in self.inside or made.primitive is p.exp_p:
            return False
        others = (v for node in self.inside for v in node.ins if v not in self.of_logits)
        return any(varies(other, axis) for other in others)
