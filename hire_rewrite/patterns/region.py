"""The code between linear layers that treats each neuron separately.

Starting from a value and one of its axes (the *hidden* axis), `grow` walks backward through
operations that act separately on each position of that axis, until it arrives at linear layers
whose output is that axis. What it passed is a *region*: it can be run again with any subset of the
positions, which is exactly what predict-then-gather needs.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives as p

from hire_rewrite.patterns.axes import Blocked, axis_rules, keeps_tokens
from hire_rewrite.patterns.graph import Node, Value
from hire_rewrite.patterns.linear import Linear
from hire_rewrite.patterns.miss import Miss
from hire_rewrite.patterns.provenance import Provenance

__all__ = ["Projection", "Region", "Uses", "Vector", "grow", "literal_array"]


class Uses(Protocol):
    """Who reads a value (see `passes.liveness`)."""

    @property
    def results(self) -> Collection[Value]:
        """Values that are results of their scope."""

    def users(self, value: Value) -> list[tuple[Node, int]]:
        """The nodes that read a value, with the operand's position."""


@dataclasses.dataclass(frozen=True)
class Projection:
    """The outputs `start : start + size` of a linear layer."""

    linear: Linear
    start: int


@dataclasses.dataclass(frozen=True)
class Vector:
    """A weight with one number for each position, for instance a bias."""

    value: Value
    axis: int
    start: int


Key = tuple[Value, int]
"""A value and where the region's window begins on its hidden axis."""


@dataclasses.dataclass(frozen=True, eq=False)
class Region:
    """Nodes that compute `value` separately for each position of `axis`.

    `projections`, `vectors` and `sides` (values that are the same for all positions) are what it
    reads; `nodes` are those that it replaces, linear layers included.
    """

    value: Value
    axis: int
    size: int
    axes: Mapping[Key, int]
    projections: tuple[Projection, ...]
    vectors: tuple[Vector, ...]
    sides: tuple[Value, ...]
    nodes: frozenset[Node]

    def run(
        self,
        pre: Sequence[jax.Array],
        vectors: Sequence[jax.Array],
        sides: Mapping[Value, Any],
    ) -> jax.Array:
        """The value at `n` of the positions.

        Args:
          pre: for each projection [tokens, n], its outputs at those positions.
          vectors: for each vector [n].
          sides: the arrays that stand for the side inputs.

        Returns:
          [tokens, n]; the tokens are in the order of the value's other axes.
        """
        n = pre[0].shape[-1]
        done: dict[Key, Any] = {}
        for projection, array in zip(self.projections, pre, strict=True):
            linear = projection.linear
            laid_out = array.reshape(*linear.token_shape, n)
            done[linear.out, projection.start] = jnp.moveaxis(laid_out, -1, linear.out_axis)
        for vector, array in zip(self.vectors, vectors, strict=True):
            shape = [1] * len(vector.value.shape)
            shape[vector.axis] = n
            done[vector.value, vector.start] = array.reshape(shape)
        result = self._run((self.value, 0), n, sides, done)
        return jnp.moveaxis(result, self.axis, -1).reshape(-1, n)

    def _run(self, key: Key, n: int, sides: Mapping[Value, Any], done: dict[Key, Any]) -> Any:
        if key in done:
            return done[key]
        value, start = key
        axis, node = self.axes[key], value.node
        assert node is not None
        rule, output = axis_rules[node.primitive], node.outs.index(value)
        operands = []
        for operand, link in zip(node.ins, rule.operands(node, axis, output), strict=True):
            if operand.literal is not None:
                operands.append(literal_array(operand))
            elif link.axis is None:
                operands.append(operand.const if operand.const is not None else sides.get(operand))
            else:
                operands.append(self._run((operand, start + link.start), n, sides, done))
        done[key] = rule.bind(node, axis, n, operands, output)
        return done[key]


def literal_array(value: Value) -> Any:
    """A literal as an operand, weakly typed where the jaxpr says so."""
    if getattr(value.aval, "weak_type", False):
        return np.asarray(value.literal).item()
    return jnp.asarray(value.literal, value.aval.dtype)


def grow(
    value: Value,
    axis: int,
    end: Node,
    linears: Mapping[Node, Linear],
    provenance: Provenance,
    uses: Uses,
) -> Region:
    """The region that computes `value` along `axis` and is read by `end` alone.

    Nodes are visited from the last to the first, so that all uses of a node's results have been
    seen when it is visited: a use outside the region stops the walk at once, and a walk costs no
    more than the region is large.

    Raises:
      Miss: the hidden axis is mixed, comes from elsewhere, or is read by others as well.
    """
    size = value.shape[axis]
    axes: dict[Key, int] = {}
    tracked: dict[Value, list[int]] = {}
    projections: list[Projection] = []
    vectors: list[Vector] = []
    sides: dict[Value, None] = {}
    nodes: set[Node] = {end}
    queue: list[tuple[int, Node]] = []
    queued: set[Node] = set()
    reader = end

    def track(value: Value, axis: int, start: int) -> None:
        if axes.setdefault((value, start), axis) != axis:
            raise Miss("its input is read along two axes of one value", reader, len(nodes))
        starts = tracked.setdefault(value, [])
        if start in starts:
            return
        starts.append(start)
        if provenance.is_weight(value) and _is_vector(value, axis):
            vectors.append(Vector(value, axis, start))
        elif value.node is None:
            raise Miss(
                "its input comes from outside: an argument, a constant or a loop's carry",
                reader,
                len(nodes),
            )
        elif value.node not in queued:
            queued.add(value.node)
            heapq.heappush(queue, (-value.node.index, value.node))

    track(value, axis, 0)
    while queue:
        node = heapq.heappop(queue)[1]
        reader = node
        weight = all(map(provenance.is_weight, node.outs))
        if not weight:
            _check_uses(node, nodes, uses)
        nodes.add(node)
        for output, result in enumerate(node.outs):
            for start in tracked.get(result, ()):
                axis = axes[result, start]
                linear = linears.get(node)
                if linear is not None and axis == linear.out_axis:
                    projections.append(Projection(linear, start))
                    continue
                rule = axis_rules.get(node.primitive)
                if rule is None:
                    raise Miss(_mixed_by(node), node, len(nodes))
                try:
                    links = rule.operands(node, axis, output)
                except Blocked as blocked:
                    raise Miss(f"its input axis {blocked}", node, len(nodes)) from None
                for operand, link in zip(node.ins, links, strict=True):
                    if operand.literal is not None:
                        continue
                    if link.axis is None:
                        sides[operand] = None
                        continue
                    if not (
                        provenance.is_weight(operand)
                        or keeps_tokens(node, operand, link.axis, axis, output)
                    ):
                        raise Miss(
                            f"{node.primitive} picks, reorders or mixes tokens", node, len(nodes)
                        )
                    track(operand, link.axis, start + link.start)
    # Weights that were only passed on the way to a vector stay with the code that computes them.
    kept = {node for node in nodes if not all(map(provenance.is_weight, node.outs))}
    inner = tuple(v for v in sides if v.const is None and v.node not in kept)
    return Region(
        value,
        axes[value, 0],
        size,
        axes,
        _ordered(projections),
        tuple(vectors),
        inner,
        frozenset(kept - {end}),
    )


def _ordered(projections: list[Projection]) -> tuple[Projection, ...]:
    return tuple(sorted(projections, key=lambda item: (item.linear.node.index, item.start)))


def _is_vector(value: Value, axis: int) -> bool:
    """Whether a weight has one number for each position, and is not one number repeated."""
    if math.prod(value.shape) != value.shape[axis]:
        return False
    node = value.node
    if node is None or node.primitive is not p.broadcast_in_dim_p:
        return True
    return axis_rules[node.primitive].operands(node, axis)[0].axis is not None


def _check_uses(node: Node, nodes: set[Node], uses: Uses) -> None:
    """Raise if a result of the node is read outside the region grown so far."""
    for result in node.outs:
        if result in uses.results:
            raise Miss(
                "its input is also a result of the function or of the loop around it",
                node,
                len(nodes),
            )
        for user, _ in uses.users(result):
            if user not in nodes:
                raise Miss(f"its input is also read by {user.primitive}", user, len(nodes))


def _mixed_by(node: Node) -> str:
    if node.primitive is p.dot_general_p:
        return "its input comes from a product that is not linear in a weight along that axis"
    return f"{node.primitive} is not known to treat the positions of its input axis separately"
