"""What can be told only when all values behind a head have been seen: choices, and sums."""

from __future__ import annotations

from jax.extend.core import primitives as p

from hire_rewrite.graph.nodes import Value
from hire_rewrite.patterns.axes import origin
from hire_rewrite.sites.head.along import varies
from hire_rewrite.sites.head.chances import is_fill
from hire_rewrite.sites.head.choices import Choices, Where
from hire_rewrite.sites.head.followed import Followed
from hire_rewrite.sites.head.taken_out import LAID
from hire_rewrite.sites.head.ways import LOST, UP


def judge_choices(order: Followed) -> None:
    """Give up the order behind choices that leave out what is great: all conditions can be
    told when all values have been seen."""
    conditions = Choices(order.known_way, order.ranks)
    for user, position, axis in order.choices:
        value, (out,) = user.ins[position], user.outs
        way = order.ways[value, axis]
        kept = conditions.kept(user, position, axis, order.greatest_first.get(value))
        others = [case for i, case in enumerate(user.ins) if i not in (0, position)]
        fine = kept is Where.ALL
        if kept is Where.OTHERS:
            order.taken.add(user, 1)
            fine = True
        elif kept in (Where.RANKS, Where.GREAT):
            fine = all(is_fill(case, way, order.powers.sign(value)) for case in others)
        if not fine and way != LOST:
            order.lost.setdefault(out, user)
            order.stack.append((out, axis, LOST))
    order.choices.clear()


def add_up(order: Followed) -> None:
    """Tell which sums along the vocabulary are sums of guesses."""

    def rises(value: Value) -> bool:
        return value.node in order.inside or order.known_way(value) == UP

    for user, value, axis in order.sums:
        way = order.ways[value, axis]
        near = way != LOST and way == order.powers.sign(value) and not _is_part(order, value, axis)
        if not near and not order.powers.weigh(value, axis, rises):
            order.looked_up.append(user.outs[0])


def _is_part(order: Followed, value: Value, axis: int) -> bool:
    """Whether only some numbers are left in the epilogue, which the logits do not say."""
    made = origin(value, LAID).node
    if made is None or made not in order.inside or made.primitive is p.exp_p:
        return False
    others = (v for node in order.inside for v in node.ins if v not in order.of_logits)
    return any(varies(other, axis) for other in others)
