"""Where values go: into the bodies of loops and branches, out of them, and what is made of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from jax.extend.core import primitives as p

from hire_rewrite.graph.nodes import Input, Node, Output, Uses, Value
from hire_rewrite.graph.reach import reached
from hire_rewrite.graph.sources import sources

Axes = list[tuple[Value, int]]
"""Values, each with its vocabulary axis."""


def enter(user: Node, value: Value, axis: int) -> Axes:
    """Into the bodies of a loop or a branch."""
    links = (
        (inner, axis - 1 if link.role == "slice" else axis) for inner, link in _inputs(user, value)
    )
    return [(inner, inside) for inner, inside in links if inside >= 0]


def leave(value: Value, axis: int) -> Axes:
    """Out of the body of a loop or a branch, and on to its next iteration."""
    outside: Axes = []
    for node, output in _outputs(value):
        stacked = node.primitive is p.scan_p and not output.feeds
        if output.outer is not None:
            outside.append((node.outs[output.outer], axis + 1 if stacked else axis))
        outside += ((node.bodies[b].scope.inputs[i], axis) for b, i in output.feeds)
    return outside


def in_bodies(node: Node, value: Value) -> list[Value]:
    """What an operand of a loop or a branch is in its bodies."""
    return [inner for inner, _ in _inputs(node, value)]


def out_of_body(value: Value) -> list[Value]:
    """What a result of a body is outside of the loop or the branch."""
    places = ((node, output.outer) for node, output in _outputs(value))
    return [node.outs[outer] for node, outer in places if outer is not None]


def made_from(value: Value) -> list[Value]:
    """What a value is computed from next: of a loop or a branch what it returns, and of an input
    of its body what that is outside."""
    node = value.node
    if node is None or not node.bodies:
        return list(sources(value))
    return [
        result
        for body in node.bodies
        for result, output in zip(body.scope.outputs, body.outputs, strict=True)
        if output.outer is not None and node.outs[output.outer] is value
    ]


def _inputs(node: Node, value: Value) -> Iterator[tuple[Value, Input]]:
    """Where an operand enters the bodies of a node."""
    for body in node.bodies:
        for inner, link in zip(body.scope.inputs, body.inputs, strict=True):
            if link.outer is value:
                yield inner, link


def _outputs(value: Value) -> Iterator[tuple[Node, Output]]:
    """Where a value leaves the body that it is in, of a node."""
    node = value.scope.parent
    for body in node.bodies if node is not None else ():
        for result, output in zip(body.scope.outputs, body.outputs, strict=True):
            if result is value and node is not None:
                yield node, output


def downstream(nodes: Collection[Node], uses: Uses) -> set[Value]:
    """The values that depend on the results of some nodes, in their scopes."""
    starts = [value for node in nodes for value in node.outs]
    return set(reached(starts, lambda v: [out for user, _ in uses.users(v) for out in user.outs]))


def made_of(product: Node, uses: Uses) -> set[Value]:
    """The values that depend on what a product returns: in its scope, outside of it, and in loops
    and branches behind it, but for the next iteration of those around it."""

    def behind(value: Value) -> Iterator[Value]:
        if value in uses.results:
            yield from out_of_body(value)
        for user, _ in uses.users(value):
            yield from (*user.outs, *in_bodies(user, value))

    return set(reached(product.outs, behind))
