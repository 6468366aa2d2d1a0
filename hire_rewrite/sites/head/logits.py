"""Where logits go: a wide axis is a vocabulary if all that happens to it is what happens to logits.

`follow` goes wherever the axis goes, through softmaxes, loops and branches, and demands that it
ends where logits end: in a reduction, an arg max, a top-k, a lookup, or the function's results.
If it is contracted with something or cut to pieces, it was not a vocabulary. If nothing ranks or
normalizes it, and its numbers are squashed or squared one by one, it may not have been one.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
from jax.extend.core import primitives as p

from hire_rewrite import _compat
from hire_rewrite.graph.nodes import Node, Uses, Value
from hire_rewrite.graph.traits import Trait, has
from hire_rewrite.patterns.axes import has_axis_rule, ordered_axis, origin, result_axis
from hire_rewrite.patterns.layout import fixed_starts
from hire_rewrite.patterns.linear import free_axes, is_one_hot
from hire_rewrite.patterns.refusal import NoMatch, Refusal
from hire_rewrite.sites.head.distortion import is_distorted
from hire_rewrite.sites.head.flow import Axes, enter, leave

_MOST = 64
"""Values that are looked at behind a lookup."""


@dataclasses.dataclass(frozen=True, eq=False)
class LogitTopK:
    """An operation that looks for the greatest of all logits, by their values.

    `gather` is the `all_gather` in front of it, where each device of a `shard_map` has some.
    """

    node: Node
    gather: Node | None = None


def follow(product: Node, axis: int, uses: Uses) -> Walk:
    """Go wherever an axis of a node's result goes.

    Raises:
      NoMatch: the axis does not end where logits end.
    """
    walk = Walk(product, axis, uses)
    while walk.stack:
        walk.visit(*walk.stack.pop())
    if walk.parted is not None and not walk.whole:
        raise walk.parted
    return walk


class Walk:
    """Forward from a product, wherever an axis of its result goes."""

    def __init__(self, product: Node, axis: int, uses: Uses) -> None:
        self.product, self.uses = product, uses
        self.width = product.outs[0].shape[axis]
        # Values, their vocabulary axes, and whether those are only a part of the vocabulary.
        self.stack: list[tuple[Value, int, bool]] = [(product.outs[0], axis, False)]
        self.seen: set[tuple[Value, int, bool]] = set()
        self.values: set[Value] = set()
        self.top_ks: dict[Node, LogitTopK] = {}
        self.gathers: dict[Value, Node] = {}
        self.parted: NoMatch | None = None
        self.whole = self.ranked = False
        self.distorted: Node | None = None

    @property
    def found(self) -> tuple[LogitTopK, ...]:
        """What looks for the greatest along the whole axis."""
        return tuple(self.top_ks.values())

    @property
    def doubt(self) -> str | None:
        """Why its numbers may be something else than logits, if so."""
        if self.distorted is None or self.ranked:
            return None
        return (
            f"{self.distorted.primitive} is applied to all of its output, and nothing ranks or "
            "normalizes it (a reconstruction, labels that are independent)"
        )

    def visit(self, value: Value, axis: int, part: bool) -> None:
        if (value, axis, part) in self.seen:
            return
        self.seen.add((value, axis, part))
        self.values.add(value)
        if value in self.uses.results:
            if part:
                raise self._refuse(
                    "a part of the wide axis is a result: not a vocabulary", self.product
                )
            self.whole = True
            if not jnp.issubdtype(value.dtype, jnp.floating):  # a decision about each of them
                self.distorted = self.distorted or value.node
            self.stack += ((*there, part) for there in leave(value, axis))
        for user, position in self.uses.users(value):
            if user.bodies:
                self.stack += ((*there, part) for there in enter(user, value, axis))
                continue
            behind = self.behind(user, position, axis)
            if not behind:
                self._consumed(user, value, axis, part)
            if is_distorted(user, position, self.values, self.uses):
                self.distorted = self.distorted or user
            if value.shape[axis] == self.width and _joins_devices(user, axis):
                self.gathers[user.outs[0]] = user
            for out, there in behind:
                if out.shape[there] == 1 < value.shape[axis]:
                    self.whole = True  # a single logit was looked up
                    continue
                cut = 2 * out.shape[there] <= value.shape[axis]
                if cut:
                    self.parted = self._cut(user)
                self.stack.append((out, there, part or cut))

    def _consumed(self, user: Node, value: Value, axis: int, part: bool) -> None:
        """An operation is the end of the axis."""
        self.whole = self.whole or not part
        searches, orders = has(user.primitive, Trait.SEARCHES), has(user.primitive, Trait.ORDERS)
        if has(user.primitive, Trait.REDUCES) and not searches:  # all of a softmax is ranked, too
            maker = origin(value, Trait.CASTS).node
            exponents = maker is not None and maker.primitive is p.exp_p
            normalizes = user.primitive is p.reduce_sum_p and exponents
            self.ranked = self.ranked or normalizes or user.primitive is p.reduce_max_p
        else:
            self.ranked = True
        if searches and orders and value.shape[axis] == self.width:
            self.top_ks[user] = LogitTopK(user)
        elif searches and value in self.gathers:
            self.top_ks[user] = LogitTopK(user, self.gathers[value])

    def behind(self, user: Node, position: int, axis: int) -> Axes:
        """Where the axis is behind one operation; nowhere if it is consumed there."""
        primitive = user.primitive
        if not user.outs:
            raise self._unknown(user)
        result = user.outs[0]
        if primitive is p.dot_general_p:
            return self._multiplied(user, position, axis)
        if has(primitive, Trait.REDUCES | Trait.ORDERS):
            behind = _reduced(user, axis)
            if not behind and has(primitive, Trait.ORDERS) and has(primitive, Trait.SEARCHES):
                self._check_lookup(user)
            return behind
        if has(primitive, Trait.SCATTERS):
            return self._stored(user, position, axis)
        if primitive is p.gather_p and not _is_slice(user, axis):
            # A lookup of some logits, or whole rows of them (beam search).
            rows = result_axis(user, position, axis) if position == 0 else None
            if rows is not None:
                return [(result, rows[0])]
            self._check_lookup(user)
            return []
        if has(primitive, Trait.MERGES):
            raise self._refuse(f"{primitive} joins parts of sums of several devices", user)
        if has(primitive, Trait.COLLECTS):
            added = not user.params["tiled"] and user.params["all_gather_dimension"] <= axis
            return [(result, axis + added)]
        if has(primitive, Trait.EXTENDS) and len(result.shape) == len(user.ins[position].shape):
            return [(out, axis) for out in user.outs]
        if primitive is _compat.stack_p:
            return [(result, axis + (user.params["axis"] <= axis))]
        if primitive is p.dynamic_slice_p and position == 0:
            if result.shape[axis] == user.ins[0].shape[axis]:
                return [(result, axis)]
            if result.shape[axis] > 1:
                raise self._cut(user)
            self._check_lookup(user)
            return []
        if not has_axis_rule(primitive):
            raise self._unknown(user)
        if primitive is p.reshape_p:
            merged = _merged(user, axis)
            if merged is not None:
                return [(result, merged)]
        places = ((out, result_axis(user, position, axis, i)) for i, out in enumerate(user.outs))
        behind = [(out, place[0]) for out, place in places if place is not None]
        if not behind:
            raise self._cut(user)
        return behind

    def _multiplied(self, user: Node, position: int, axis: int) -> Axes:
        """Behind another product: whose axis it becomes, or chosen from by one-hot rows."""
        batch = user.params["dimension_numbers"][1]
        free = free_axes(user, position)
        if axis in free:
            return [(user.outs[0], free[axis])]
        if axis in batch[position] or not is_one_hot(user.ins[1 - position]):
            reason = "the wide axis takes part in another product: not a vocabulary"
            raise self._refuse(reason, user, Refusal.CONTRACTED)
        return []

    def _stored(self, user: Node, position: int, axis: int) -> Axes:
        """Behind a scatter, into the logits or of the logits into a buffer."""
        if position == 0:
            return [(user.outs[0], axis)]
        numbers = user.params["dimension_numbers"]
        inserted = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
        window = [i for i in range(len(user.outs[0].shape)) if i not in inserted]
        if position == 2 and axis in numbers.update_window_dims:
            return [(user.outs[0], window[numbers.update_window_dims.index(axis)])]
        raise self._refuse(f"{user.primitive} scatters along the wide axis", user)

    def _check_lookup(self, user: Node) -> None:
        """Raise if numbers that were looked up go into a product soon: scores of an attention."""
        for value in _soon(user.outs[0], self.uses):
            for reader, position in self.uses.users(value):
                if reader.primitive is p.dot_general_p and not is_one_hot(reader.ins[1 - position]):
                    reason = "what is looked up in it is multiplied: not a vocabulary"
                    raise self._refuse(reason, user, Refusal.CONTRACTED)

    def _cut(self, user: Node) -> NoMatch:
        return self._refuse(f"{user.primitive} cuts or mixes the wide axis", user)

    def _unknown(self, user: Node) -> NoMatch:
        reason = f"{user.primitive} is not known to consume logits"
        return self._refuse(reason, user, Refusal.UNKNOWN_OPERATION)

    def _refuse(self, reason: str, node: Node, kind: Refusal = Refusal.NOT_LOGITS) -> NoMatch:
        return NoMatch(kind, reason, node, len(self.seen))


def _soon(value: Value, uses: Uses) -> list[Value]:
    """Numbers, and what is made of them next in their scope."""
    seen = [value]
    for current in seen:
        for user, _ in uses.users(current):
            if len(seen) < _MOST and not user.bodies:
                numbers = (out for out in user.outs if jnp.issubdtype(out.dtype, jnp.floating))
                seen += [out for out in numbers if out not in seen]
    return seen


def _joins_devices(user: Node, axis: int) -> bool:
    """Whether it joins the logits of all devices along the vocabulary."""
    params = user.params
    return (
        has(user.primitive, Trait.COLLECTS)
        and params["tiled"]
        and params["all_gather_dimension"] == axis
        and params["axis_index_groups"] is None
    )


def _merged(user: Node, axis: int) -> int | None:
    """The axis to which a reshape merges the beams and, as the last of them, the vocabulary."""
    old, new = user.ins[0].shape, user.outs[0].shape
    for i, size in enumerate(new):
        behind = math.prod(new[i + 1 :]) == math.prod(old[axis + 1 :])
        if size != old[axis] and size % old[axis] == 0 and behind:
            return i
    return None


def _reduced(user: Node, axis: int) -> Axes:
    """Behind a reduction, a sort or a scan along some axis: gone if it is the vocabulary's."""
    gone = user.params.get("axes", user.params.get("dimensions"))
    if gone is not None:
        kept = axis - sum(i < axis for i in gone)
        return [] if axis in gone else [(out, kept) for out in user.outs]
    return [] if ordered_axis(user) == axis else [(out, axis) for out in user.outs]


def _is_slice(user: Node, axis: int) -> bool:
    """Whether a gather cuts an axis as a slice does."""
    collapsed = user.params["dimension_numbers"].collapsed_slice_dims
    return axis not in collapsed and fixed_starts(user) is not None
