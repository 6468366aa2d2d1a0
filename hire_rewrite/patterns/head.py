"""Vocabulary heads: a linear layer onto a large axis that only logits' consumers read.

The match has two halves. `_follow` goes wherever the vocabulary axis goes, through softmaxes,
loops and branches, and demands that it ends where logits end: in a reduction, an arg max, a
top-k, a lookup, or the function's results. If it is contracted with something or cut to pieces,
it was no vocabulary. `_chain` collects the code that treats each logit separately (scale, bias,
soft-cap, mask, noise), since candidates have to be chosen by what it returns.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Collection, Mapping

import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives as p

from hire_rewrite.patterns.axes import axis_rules, keeps_tokens, result_axis
from hire_rewrite.patterns.graph import Node, Value
from hire_rewrite.patterns.linear import Linear
from hire_rewrite.patterns.miss import Miss
from hire_rewrite.patterns.region import Uses

__all__ = ["HeadMatch", "match_head"]

_SINKS = frozenset(
    {p.argmax_p, p.argmin_p, p.reduce_max_p, p.reduce_min_p, p.reduce_sum_p, p.reduce_or_p}
    | {p.reduce_and_p, p.top_k_p, p.approx_top_k_p, p.sort_p, p.cumsum_p, p.cumlogsumexp_p}
    | {p.gather_p}
)
"""Operations that consume logits; what they return is no longer followed."""

_INCREASING = frozenset(
    {p.add_p, p.sub_p, p.mul_p, p.div_p, p.tanh_p, p.logistic_p, p.exp_p, p.max_p, p.min_p}
    | {p.clamp_p, p.select_n_p, p.convert_element_type_p, p.copy_p, p.name_p, p.stop_gradient_p}
    | {p.broadcast_in_dim_p, p.transpose_p, p.squeeze_p, p.reshape_p, p.sharding_constraint_p}
    | {p.gt_p, p.ge_p, p.lt_p, p.le_p, p.reduce_precision_p, p.not_p, p.and_p, p.or_p}
)
"""Operations through which a larger logit stays larger, or that a `select_n` may ask about."""


@dataclasses.dataclass(frozen=True, eq=False)
class HeadMatch:
    """A vocabulary head.

    `chain` are the nodes behind the product that treat each logit separately, in order; `axes`
    the vocabulary axis of each value between; `endpoints` the values that others read.
    """

    linear: Linear
    chain: tuple[Node, ...]
    axes: Mapping[Value, int]
    endpoints: tuple[Value, ...]

    @property
    def nodes(self) -> frozenset[Node]:
        return frozenset({self.linear.node, *self.chain})

    @property
    def sides(self) -> tuple[Value, ...]:
        """What the chain reads besides logits: biases, masks, temperatures, noise."""
        operands = (value for node in self.chain for value in node.ins)
        outside = (v for v in operands if v not in self.axes and v.literal is None)
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
    linear: Linear, min_width: int, uses: Uses, taken: Collection[Node] = ()
) -> HeadMatch:
    """The head that begins with `linear`; nodes in `taken` belong to heads before it.

    Raises:
      Miss: its output is no vocabulary.
    """
    if linear.out_dim < min_width:
        raise Miss(
            f"its width {linear.out_dim} is below min_width={min_width} of a vocabulary",
            linear.node,
        )
    if linear.out_dim < 2 * linear.in_dim:
        raise Miss(
            f"its width {linear.out_dim} is less than twice its input's {linear.in_dim}: "
            "no vocabulary",
            linear.node,
        )
    _follow(linear, uses)
    return _chain(linear, uses, taken)


def _follow(linear: Linear, uses: Uses) -> None:
    """Raise unless the vocabulary axis ends where logits end."""
    seen: set[tuple[Value, int]] = set()
    stack = [(linear.out, linear.out_axis)]
    while stack:
        value, axis = stack.pop()
        if (value, axis) in seen:
            continue
        seen.add((value, axis))
        if value in uses.results:
            stack += _leave(value, axis)
        for user, position in uses.users(value):
            if user.bodies:
                stack += _enter(user, value, axis)
            elif user.primitive not in _SINKS:
                stack += _pass(user, position, axis, len(seen))


def _pass(user: Node, position: int, axis: int, matched: int) -> list[tuple[Value, int]]:
    if user.primitive is p.dot_general_p:
        raise Miss("the wide axis takes part in another product: no vocabulary", user, matched)
    if user.primitive in (p.scatter_p, p.scatter_add_p) and position == 0:
        return [(user.outs[0], axis)]
    if user.primitive is p.dynamic_slice_p and position == 0:
        if user.outs[0].shape[axis] == user.ins[0].shape[axis]:
            return [(user.outs[0], axis)]
        raise Miss("dynamic_slice cuts the wide axis", user, matched)
    if user.primitive not in axis_rules:
        raise Miss(f"{user.primitive} is not known to consume logits", user, matched)
    found = result_axis(user, position, axis)
    if found is None:
        raise Miss(f"{user.primitive} cuts or mixes the wide axis", user, matched)
    return [(user.outs[0], found)]


def _enter(user: Node, value: Value, axis: int) -> list[tuple[Value, int]]:
    """Into the bodies of a loop or a branch."""
    found = []
    for body in user.bodies:
        for inner, link in zip(body.scope.inputs, body.inputs, strict=True):
            if link.outer is value:
                found.append((inner, axis - 1 if link.role == "slice" else axis))
    return [(inner, a) for inner, a in found if a >= 0]


def _leave(value: Value, axis: int) -> list[tuple[Value, int]]:
    """Out of the body of a loop or a branch, and on to its next iteration."""
    node = value.scope.parent
    if node is None:
        return []
    found = []
    for body in node.bodies:
        for result, output in zip(body.scope.outputs, body.outputs, strict=True):
            if result is not value:
                continue
            stacked = node.primitive is p.scan_p and not output.feeds
            if output.outer is not None:
                found.append((node.outs[output.outer], axis + 1 if stacked else axis))
            for b, i in output.feeds:
                found.append((node.bodies[b].scope.inputs[i], axis))
    return found


def _chain(linear: Linear, uses: Uses, taken: Collection[Node]) -> HeadMatch:
    axes = {linear.out: linear.out_axis}
    tainted = {linear.out}
    chain: list[Node] = []
    theirs = _downstream(taken, uses)
    queue = [(user.index, user) for user, _ in uses.users(linear.out)]
    queued = {user for _, user in queue}
    heapq.heapify(queue)
    while queue:
        _, node = heapq.heappop(queue)
        # Two heads must not wait for each other: this one waits for none before it.
        free = node not in taken and not any(v in theirs for v in node.ins if v not in axes)
        axis = _chain_axis(node, axes, tainted) if free else None
        if axis is not None:
            axes[node.outs[0]] = axis
            chain.append(node)
        tainted.update(node.outs)
        for result in node.outs:
            for user, _ in uses.users(result):
                if user not in queued:
                    queued.add(user)
                    heapq.heappush(queue, (user.index, user))
    return _pruned(linear, chain, axes, uses)


def _chain_axis(node: Node, axes: Mapping[Value, int], tainted: set[Value]) -> int | None:
    """The vocabulary axis of the node's result if the node belongs to the chain."""
    if node.primitive not in _INCREASING or node.bodies:
        return None
    touched = [(i, v) for i, v in enumerate(node.ins) if v in tainted]
    if any(v not in axes for _, v in touched):
        return None
    if node.primitive in (p.sub_p, p.div_p) and any(i == 1 for i, _ in touched):
        return None  # the larger the logit, the smaller the result
    if node.primitive in (p.mul_p, p.div_p) and any(_is_negative(v) for v in node.ins):
        return None
    found = {result_axis(node, i, axes[v]) for i, v in touched}
    if len(found) != 1:
        return None
    (axis,) = found
    operand = touched[0][1]
    if axis is None or not keeps_tokens(node, operand, axes[operand], axis):
        return None
    return axis


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


def _pruned(linear: Linear, chain: list[Node], axes: dict[Value, int], uses: Uses) -> HeadMatch:
    """Drop the nodes whose result is no logit but is read outside the chain."""
    while True:
        inside = {linear.node, *chain}

        def escapes(value: Value, inside: set[Node] = inside) -> bool:
            return value in uses.results or any(u not in inside for u, _ in uses.users(value))

        ends = [v for v in (linear.out, *(n.outs[0] for n in chain)) if escapes(v)]
        wrong = [v for v in ends if not jnp.issubdtype(v.dtype, jnp.floating)]
        if not wrong:
            kept = {linear.out, *(n.outs[0] for n in chain)}
            return HeadMatch(
                linear, tuple(chain), {v: a for v, a in axes.items() if v in kept}, tuple(ends)
            )
        dropped = set(wrong)
        for node in chain:
            if any(v in dropped for v in node.ins):
                dropped.update(node.outs)
        chain = [node for node in chain if node.outs[0] not in dropped]
