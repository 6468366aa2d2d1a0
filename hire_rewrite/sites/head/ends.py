"""Where the vocabulary ends behind a head: in a reduction, a search, a sort, or a lookup."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives as p

from hire_rewrite.graph.nodes import Node, Value, source_of
from hire_rewrite.graph.traits import Trait, has
from hire_rewrite.patterns.axes import origin
from hire_rewrite.sites.head.distortion import constant_of
from hire_rewrite.sites.head.followed import Followed
from hire_rewrite.sites.head.in_order import InOrder
from hire_rewrite.sites.head.looked_up import index_along
from hire_rewrite.sites.head.ways import DOWN, LOST, UP


def consume(order: Followed, user: Node, position: int, axis: int, way: int) -> None:
    """An operation is the end of the axis."""
    primitive, value = user.primitive, user.ins[position]
    why = f"{primitive} ranks them ({source_of(user)})"
    if primitive in (p.gather_p, p.dynamic_slice_p, p.dot_general_p):
        _look_up(order, user, position, axis, way)
        return
    if has(primitive, Trait.REDUCES) and user.outs[0].shape == value.shape:
        order.lost.setdefault(user.outs[0], user)  # sums of all before
        order.stack.append((user.outs[0], axis, LOST))
        return
    wanted: tuple[int, ...] = (UP, DOWN)
    if has(primitive, Trait.REDUCES) and way == LOST and order.is_stepped(value):
        wanted = ()
    elif primitive is p.reduce_sum_p:
        order.sums.append((user, value, axis))
        return
    elif primitive in (p.reduce_p, p.reduce_prod_p) or (
        primitive is p.reduce_min_p and _is_of_kept(value)
    ):
        order.looked_up += user.outs
        return
    elif primitive is p.reduce_min_p or user.params.get("is_max_k") is False:
        wanted = (DOWN,)
    elif primitive is p.reduce_max_p or has(primitive, Trait.SEARCHES):
        wanted = (UP,)
    elif primitive is p.sort_p:
        wanted = _wanted_of_sorted(order, user, value, axis, way)
    if way not in wanted:
        order.refuse(value, way, why)


def _wanted_of_sorted(
    order: Followed, user: Node, value: Value, axis: int, way: int
) -> tuple[int, ...]:
    """The ways in which numbers may be sorted: those for which their least ones are not seen to
    be read. How many of the greatest are is remembered."""
    if user.ins[0] is not value:
        return ()
    read = InOrder(order, user, axis, way)
    order.looked_up += read.looked_up
    order.masks += read.masks
    numbers = [out for out in user.outs if jnp.issubdtype(out.dtype, jnp.floating)]
    order.in_order.update(numbers)
    order.stack += ((out, axis, way) for out in numbers)
    for ranks, place, turned in read.ranks:
        order.ways.setdefault((ranks, place), -way if turned else way)
    wanted = {UP, DOWN}
    for part, start, limit, size, tokens in read.parts:
        if start == 0 and limit < size:
            wanted.discard(UP)
        elif start > 0 and limit == size:
            wanted.discard(DOWN)
        depth = size - start if way == UP else limit  # numbers ascend
        if tokens or 2 * depth <= size:
            order.depth = max(order.depth, depth)
        else:
            order.looked_up.append(part)
    if read.unknown is not None:
        order.reason = (
            "its logits are put in order, and what is read at a rank that is not known before, "
            f"or for each token in order ({source_of(read.unknown)}), may be none of the "
            "greatest"
        )
    return tuple(wanted)


def _look_up(order: Followed, user: Node, position: int, axis: int, way: int) -> None:
    """Some logits of each token are asked for, or what lies where they say."""
    value, (some,) = user.ins[position], user.outs
    if position > 0 and user.primitive is not p.dot_general_p:
        if order.is_stepped(value):
            order.refuse(value, way, f"{user.primitive} asks for them ({source_of(user)})")
        return
    index = user.ins[0] if position == 1 else index_along(user, axis)
    if not order.says_which(index, value.shape[axis]):
        keep_looked_up(order, some, value, way)
        return
    for place, extent in enumerate(some.shape):  # all of them, in order
        if extent == value.shape[axis] and user.primitive is p.gather_p:
            order.in_order.add(some)
            order.stack.append((some, place, way))


def _is_of_kept(value: Value) -> bool:
    """Whether numbers are infinite where they were left out, so that the least is of the others."""
    node = value.node
    numbers = map(constant_of, node.ins[1:] if node is not None else ())
    chosen = node is not None and node.primitive is p.select_n_p
    return chosen and any(n is not None and np.all(np.asarray(n) == np.inf) for n in numbers)


def keep_looked_up(order: Followed, some: Value, logits: Value, way: int) -> None:
    """Remember some logits of each token, which may be guesses."""
    blamed = order.lost.get(logits)
    summed = blamed is not None and has(blamed.primitive, Trait.REDUCES)
    source = origin(logits, Trait.CASTS | Trait.MOVES | Trait.CUTS)
    searched = summed and not order.ranks.make(logits)
    if way == LOST and (searched or order.is_stepped(source)):
        order.refuse(logits, way, "some of them are looked up")
    order.looked_up.append(some)
