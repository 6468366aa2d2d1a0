"""Vocabulary heads: a linear layer onto a large axis that only logits' consumers read.

The match has two halves. `logits.follow` demands that the vocabulary axis ends where logits end.
`_chain` collects the code that treats each logit separately (scale, bias,
soft-cap, mask, noise), since candidates have to be chosen by what it returns.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Collection, Mapping

import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives as p

from hire_rewrite import _compat
from hire_rewrite.graph.nodes import Node, Uses, Value
from hire_rewrite.graph.provenance import Provenance
from hire_rewrite.patterns.axes import axis_rules, keeps_tokens, result_axis
from hire_rewrite.patterns.linear import Linear
from hire_rewrite.patterns.miss import Miss
from hire_rewrite.patterns.window import Window
from hire_rewrite.sites.head.logits import Search, follow

__all__ = ["HeadMatch", "match_head"]

_SCALING = frozenset({p.convert_element_type_p, p.reshape_p, p.neg_p, p.copy_p, p.name_p})

Place = tuple[int, int]
"""An axis, and the row of the vocabulary that position 0 of it belongs to."""

_INCREASING = frozenset(
    {p.add_p, p.sub_p, p.mul_p, p.div_p, p.tanh_p, p.logistic_p, p.exp_p, p.max_p, p.min_p}
    | {p.clamp_p, p.select_n_p, p.convert_element_type_p, p.copy_p, p.name_p, p.stop_gradient_p}
    | {p.broadcast_in_dim_p, p.transpose_p, p.squeeze_p, p.reshape_p, p.sharding_constraint_p}
    | {p.gt_p, p.ge_p, p.lt_p, p.le_p, p.reduce_precision_p, p.not_p, p.and_p, p.or_p}
    | {p.slice_p, *_compat.sharding_casts}
)
"""Operations through which a larger logit stays larger, or that a `select_n` may ask about."""


@dataclasses.dataclass(frozen=True, eq=False)
class HeadMatch:
    """A vocabulary head.

    `chain` are the nodes behind the product that treat each logit separately, in order; `places`
    the vocabulary in each value between: its axis, and the row that position 0 of it belongs to;
    `endpoints` the values that others read; `searches` the operations behind them that look for the
    greatest of the whole vocabulary. `unsupported` says why it cannot be rewritten, if so.
    """

    linear: Linear
    axis: int
    chain: tuple[Node, ...]
    places: Mapping[Value, Place]
    endpoints: tuple[Value, ...]
    searches: tuple[Search, ...] = ()

    @property
    def width(self) -> int:
        return self.linear.out.shape[self.axis]

    @property
    def unsupported(self) -> str | None:
        if self.linear.out_dim != self.width or self.linear.experts() > 1:
            return "several vocabularies lie side by side in one product"
        return None

    @property
    def nodes(self) -> frozenset[Node]:
        return frozenset({self.linear.node, *self.chain})

    @property
    def shared(self) -> frozenset[Node]:
        return frozenset()

    @property
    def sides(self) -> tuple[Value, ...]:
        """What the chain reads besides logits: biases, masks, temperatures, noise."""
        operands = (value for node in self.chain for value in node.ins)
        outside = (v for v in operands if v not in self.places and v.literal is None)
        return tuple(dict.fromkeys(v for v in outside if v.const is None))

    @property
    def inputs(self) -> tuple[Value, ...]:
        return (self.linear.x, *self.sides)

    @property
    def outputs(self) -> tuple[Value, ...]:
        return self.endpoints

    @property
    def weights(self) -> tuple[Value, ...]:
        return (self.linear.weight,)

    @property
    def linears(self) -> tuple[Linear, ...]:
        return (self.linear,)


def match_head(
    linear: Linear,
    min_width: int,
    linears: Mapping[Node, Linear],
    provenance: Provenance,
    uses: Uses,
    taken: Collection[Node] = (),
) -> HeadMatch:
    """The head that begins with `linear`; nodes in `taken` belong to heads before it.

    Raises:
      Miss: its output is no vocabulary.
    """
    axis = max(linear.out_axes, key=lambda i: linear.out.shape[i], default=None)
    width = 1 if axis is None else linear.out.shape[axis]
    if axis is None or width < min_width:
        raise Miss(f"its width {width} is below min_width={min_width} of a vocabulary", linear.node)
    if width < 2 * linear.in_dim:
        raise Miss(
            f"its width {width} is less than twice its input's {linear.in_dim}: no vocabulary",
            linear.node,
        )
    if linear.batch:
        raise Miss(
            "a weight for each of several inputs (attention heads, experts): no vocabulary",
            linear.node,
        )
    _check_sums(linear, linears, provenance, uses)
    searches = follow(linear.node, axis, uses)
    return dataclasses.replace(_chain(linear, axis, uses, taken), searches=searches)


def _check_sums(
    linear: Linear, linears: Mapping[Node, Linear], provenance: Provenance, uses: Uses
) -> None:
    """Raise if the product is only a part of logits, or distances to the rows of a codebook."""
    made: dict[Value, Linear] = {}
    for other in linears.values():
        for value in _scaled(other.out, provenance, uses):
            made[value] = other
    roots = set(provenance.roots(linear.weight))
    for value in _scaled(linear.out, provenance, uses):
        for user, position in uses.users(value):
            if user.primitive not in (p.add_p, p.sub_p):
                continue
            added = user.ins[1 - position]
            sum_of = made.get(added)
            if sum_of is not None and 2 * linear.in_dim <= sum_of.in_dim:
                raise Miss(
                    f"a low-rank product of rank {linear.in_dim} (LoRA) that is added to another",
                    linear.node,
                )
            if provenance.is_weight(added) and roots & set(provenance.roots(added)):
                raise Miss("it is part of distances to the rows of a codebook", user)


def _scaled(value: Value, provenance: Provenance, uses: Uses) -> list[Value]:
    """A value and what is made of it by casts, scales, sums and layout."""
    found = [value]
    for current in found:
        for user, position in uses.users(current):
            if len(user.ins) == 1:
                plain = user.primitive in _SCALING
            else:
                other = user.ins[1 - position]
                plain = user.primitive in (p.add_p, p.sub_p) or (
                    user.primitive in (p.mul_p, p.div_p) and provenance.is_weight(other)
                )
            if plain and len(found) < 8:
                found += user.outs
    return found


def _chain(linear: Linear, axis: int, uses: Uses, taken: Collection[Node]) -> HeadMatch:
    places: dict[Value, Place] = {linear.out: (axis, 0)}
    tainted = {linear.out}
    chain: list[Node] = []
    theirs = _downstream(taken, uses)
    queue = [(user.index, user) for user, _ in uses.users(linear.out)]
    queued = {user for _, user in queue}
    heapq.heapify(queue)
    while queue:
        _, node = heapq.heappop(queue)
        # Two heads must not wait for each other: this one waits for none before it.
        free = node not in taken and not any(v in theirs for v in node.ins if v not in places)
        place = _chain_place(node, places, tainted) if free else None
        if place is not None:
            places[node.outs[0]] = place
            chain.append(node)
        tainted.update(node.outs)
        for result in node.outs:
            for user, _ in uses.users(result):
                if user not in queued:
                    queued.add(user)
                    heapq.heappush(queue, (user.index, user))
    return _pruned(linear, axis, chain, places, uses)


def _chain_place(node: Node, places: Mapping[Value, Place], tainted: set[Value]) -> Place | None:
    """Where the vocabulary is in the node's result, if the node belongs to the chain."""
    if node.primitive not in _INCREASING or node.bodies:
        return None
    touched = [(i, v) for i, v in enumerate(node.ins) if v in tainted]
    if any(v not in places for _, v in touched):
        return None
    if node.primitive in (p.sub_p, p.div_p) and any(i == 1 for i, _ in touched):
        return None  # the larger the logit, the smaller the result
    if node.primitive in (p.mul_p, p.div_p) and any(_is_negative(v) for v in node.ins):
        return None
    found: set[Place] = set()
    for i, value in touched:
        axis, start = places[value]
        result = result_axis(node, i, axis)
        if result is None:
            return None
        window = Window(result[0], node.outs[0].shape[result[0]])
        inner = axis_rules[node.primitive].operands(node, window)[i]
        if inner.picks or not keeps_tokens(node, value, inner, window):
            return None
        found.add((result[0], start + result[1]))
    return found.pop() if len(found) == 1 else None


def _downstream(nodes: Collection[Node], uses: Uses) -> set[Value]:
    """The values that depend on the results of some nodes."""
    found: set[Value] = set()
    stack = [value for node in nodes for value in node.outs]
    while stack:
        value = stack.pop()
        if value not in found:
            found.add(value)
            stack += [result for user, _ in uses.users(value) for result in user.outs]
    return found


def _is_negative(value: Value) -> bool:
    return value.literal is not None and bool(np.all(np.asarray(value.literal) < 0))


def _pruned(
    linear: Linear, axis: int, chain: list[Node], places: dict[Value, Place], uses: Uses
) -> HeadMatch:
    """Drop the nodes whose result is no logit but is read outside the chain."""
    while True:
        inside = {linear.node, *chain}

        def escapes(value: Value, inside: set[Node] = inside) -> bool:
            return value in uses.results or any(u not in inside for u, _ in uses.users(value))

        ends = [v for v in (linear.out, *(n.outs[0] for n in chain)) if escapes(v)]
        wrong = [v for v in ends if not jnp.issubdtype(v.dtype, jnp.floating)]
        if not wrong or not chain:
            kept = {linear.out, *(n.outs[0] for n in chain)}
            inner = {v: place for v, place in places.items() if v in kept}
            return HeadMatch(linear, axis, tuple(chain), inner, tuple(ends))
        dropped = set(wrong)
        for node in chain:
            if any(v in dropped for v in node.ins):
                dropped.update(node.outs)
        chain = [node for node in chain if node.outs[0] not in dropped]
