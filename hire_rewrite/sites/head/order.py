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
from hire_rewrite.sites.head.ends import consume, keep_looked_up
from hire_rewrite.sites.head.flow import enter, leave
from hire_rewrite.sites.head.followed import Followed
from hire_rewrite.sites.head.judged import add_up, judge_choices
from hire_rewrite.sites.head.logits import Walk
from hire_rewrite.sites.head.looked_up import decided_by
from hire_rewrite.sites.head.steps import is_stepped, may_level
from hire_rewrite.sites.head.taken_out import LAID
from hire_rewrite.sites.head.ways import LOST, UP, is_noise, way_moved, way_of_each


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


_IN_ORDER = Trait.POINTWISE | Trait.MOVES | Trait.KEEPS | Trait.CUTS

AS_LOGITS = Ranked(None, 0, 0.0, 1)
"""What is ranked is the logits themselves."""


def ranked(walk: Walk, outputs: Collection[tuple[Value, int]], inside: Collection[Node]) -> Ranked:
    """What is ranked behind a head.

    Args:
      walk: of the head's logits, which has found that something is.
      outputs: what its epilogue returns, each with its vocabulary axis.
      inside: the epilogue.
    """
    order = Followed(walk, inside)
    order.logits.update(origin(value, LAID) for value, _ in outputs)
    whole = jnp.issubdtype(walk.product.outs[0].dtype, jnp.integer)  # logits that are integers
    order.stack = [
        (value, axis, LOST if is_stepped(value) and not whole else UP) for value, axis in outputs
    ]
    while order.stack and order.reason is None:
        _visit(order, *order.stack.pop())
        if not order.stack:
            judge_choices(order)
    decides = None
    if order.reason is None and any(value not in order.greatest_first for value in order.cut):
        order.reason = "its logits are put in order, and what is cut of them is not followed"
    if order.reason is None and any(map(order.asked_otherwise, order.masks)):
        order.reason = (
            "its logits are put in order, and which of them have some ranks is asked for otherwise "
            "than to choose from them"
        )
    if order.reason is None:
        add_up(order)
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
    depth = min(max([1, order.depth, *searched]) + int(taken), walk.width)
    return Ranked(order.reason, order.taken.at_most, order.rounding, depth)


def _visit(order: Followed, value: Value, axis: int, way: int) -> None:
    known = order.ways.get((value, axis))
    if known in (way, LOST):
        return
    if value.shape[axis] == 1:
        keep_looked_up(order, value, value, way)
        return
    if known is not None:  # both ways round, from iteration to iteration
        way = LOST
    order.ways[value, axis] = way
    if value in order.uses.results:
        _pass_on(order, value, leave(value, axis), way)
        judged = jnp.issubdtype(value.dtype, jnp.floating) or order.is_stepped(value)
        if value.scope.parent is None and judged and way != UP:
            order.refuse(value, way, "they are returned")
    for user, position in order.uses.users(value):
        if user in order.inside:
            continue
        if user.bodies:
            _pass_on(order, value, enter(user, value, axis), way)
        elif value not in order.in_order:
            _used(order, user, position, axis, way)
        elif (back := _put_back(order, user, position, axis)) is not None:
            order.stack.append((*back, way))
        elif not _is_of_ranks(order, user, position):
            _used(order, user, position, axis, way)


def _used(order: Followed, user: Node, position: int, axis: int, way: int) -> None:
    """Go on behind one operation."""
    value = user.ins[position]
    sorted_ = value in order.in_order
    try:
        behind = order.walk.behind(user, position, axis)
    except NoMatch as refused:
        order.reason = f"its logits are put in order, and {refused.reason}"
        return
    if not behind:
        consume(order, user, position, axis, way)
        return
    chooses = user.primitive is p.select_n_p and position == 0
    there = _way(order, user, position, axis) if way != LOST or chooses else LOST
    if there is None:
        return
    for out, place in behind:
        if sorted_ and out.shape[place] < value.shape[axis]:
            order.cut.append(value)  # what is read of them is told where they were sorted
            continue
        if sorted_ and (has(user.primitive, _IN_ORDER) or user.primitive in (p.rev_p, p.gather_p)):
            order.in_order.add(out)
        if there == LOST:
            order.lost.setdefault(out, order.lost.get(value, user))
        order.stack.append((out, place, way * there))


def _pass_on(
    order: Followed, value: Value, places: Collection[tuple[Value, int]], way: int
) -> None:
    """Go on where a value enters or leaves a body."""
    for there, axis in places:
        if value in order.lost:
            order.lost.setdefault(there, order.lost[value])
        if value in order.in_order and there.scope.parent is not value.scope.parent:
            order.in_order.add(there)
        order.stack.append((there, axis, way))


def _put_back(order: Followed, user: Node, position: int, axis: int) -> tuple[Value, int] | None:
    """What sorted numbers are written to by their tokens, if an operation does that."""
    size = user.ins[position].shape[axis]
    if user.primitive is p.sort_p and position > 0 and order.ranks.make(user.ins[0]):
        return user.outs[position], axis
    written = user.primitive is p.scatter_p and position == 2
    read = user.primitive is p.gather_p and position == 0 and size in user.outs[0].shape
    if (written or read) and order.ranks.make(user.ins[1]):
        (out,) = user.outs
        axes = [i for i, extent in enumerate(out.shape) if extent == size]
        return (out, axes[-1]) if axes else None
    return None


def _is_of_ranks(order: Followed, user: Node, position: int) -> bool:
    """Whether an operation on sorted numbers is about their ranks."""
    if order.ranks.is_sum_of_the_greatest(user):
        return True
    if not has(user.primitive, Trait.ADDS):  # sums of all before, but of itself
        return False
    other = origin(user.ins[1 - position], Trait.CASTS | Trait.MOVES | Trait.KEEPS)
    return other.node is not None and order.ranks.is_sum_of_the_greatest(other.node)


def _way(order: Followed, user: Node, position: int, axis: int) -> int | None:
    """How the order of a result is that of an operand; None if its numbers are not followed."""
    primitive, value = user.primitive, user.ins[position]
    if has(primitive, Trait.REDUCES | Trait.ORDERS):
        gone = user.params.get("axes", ())
        alone = all(value.shape[i] == 1 for i in gone) and bool(gone)
        return UP if alone or primitive is p.reduce_max_p else LOST
    if has(primitive, Trait.SCATTERS) and position == 0:
        all_ = user.primitive is p.scatter_p and user.ins[2].shape == value.shape
        if all_ and order.ranks.make(user.ins[1]):
            return None  # nothing is left of it
        return UP if order.taken.by_scatter(user, axis) else LOST
    if not has(primitive, Trait.POINTWISE):
        return way_moved(user, position, axis)
    _round(order, user, position)
    if primitive is p.select_n_p and position == 0:  # what it keeps is told where that is met
        return None if any(case in order.of_logits for case in user.ins[1:]) else LOST
    if not jnp.issubdtype(user.outs[0].dtype, jnp.floating):
        if not order.asks(user.outs[0]):
            return None
        if order.is_stepped(user.outs[0]):
            return LOST
        if value not in order.in_order:
            order.masks += user.outs
        return None
    others = [other for i, other in enumerate(user.ins) if i != position]
    if primitive is p.select_n_p:
        order.choices.append((user, position, axis))
        alike = all(_is_alike(order, case, value, axis) for case in user.ins[1:])
        return UP if alike else LOST
    if not all(is_noise(user, other, axis) for other in others):
        return LOST
    limits = order.normalized.limits(value, value.shape[axis])
    if may_level(user, position, others, *(limits or ())):
        return LOST
    turn = math.prod(map(order.factors.sign, others))
    return way_of_each(user, position, turn, order.powers.sign(value))


def _round(order: Followed, user: Node, position: int) -> None:
    """Remember an operation that may make two numbers one."""
    before, after = user.ins[position].dtype, user.outs[0].dtype
    if not jnp.issubdtype(after, jnp.floating) or user.primitive is p.select_n_p:
        return
    unit = float(jnp.finfo(after).eps)
    if has(user.primitive, Trait.CASTS) and unit <= float(jnp.finfo(before).eps):
        return
    order.rounding = max(order.rounding, unit)


def _is_alike(order: Followed, case: Value, other: Value, axis: int) -> bool:
    """Whether a case of a choice is ordered as another one is, or is one number."""
    if case is other or not varies(case, axis) or case not in order.of_logits:
        return True
    ways = order.ways.get((case, axis)), order.ways.get((other, axis))
    return ways[0] is None or ways[0] == ways[1]
