"""Why a site cannot be replaced, whatever stands in its place."""

from __future__ import annotations

from collections.abc import Collection

from hire_rewrite import _compat
from hire_rewrite.graph.effects import effect_edges, touches
from hire_rewrite.graph.nodes import Node, Value
from hire_rewrite.graph.source import source_of


def unsupported_reason(nodes: Collection[Node], inputs: Collection[Value]) -> str | None:
    """Why some nodes of one scope have to stay as they are; None if they can be replaced.

    Args:
      inputs: what their replacement reads.
    """
    for node in nodes:
        if _compat.has_effects(node.eqn):
            return f"{_described(node)} is a part of it"
    notes = {_compat.annotations(node.eqn) for node in nodes}
    if len(notes) > 1:
        return "only some of its operations are annotated with a compute type or XLA metadata"
    between = _between(nodes, inputs)
    return None if between is None else f"{_described(between)} has to run between its operations"


def _between(nodes: Collection[Node], inputs: Collection[Value]) -> Node | None:
    """A node with an effect that has to run after some of the nodes and before others of them."""
    order = next(iter(nodes)).scope.nodes
    if not any(map(touches, order)):
        return None
    before: dict[Node, list[Node]] = {}
    for i, j in effect_edges([(node,) for node in order]):
        before.setdefault(order[j], []).append(order[i])
    behind: dict[Node, Node] = {}  # nodes that wait for the site, and the effect on the way
    site = set(nodes)
    for node in order:
        if node in site:
            continue
        sources = [value.node for value in node.ins if value.node is not None]
        sources += before.get(node, [])
        waits = [source for source in sources if source in site or source in behind]
        if waits:
            effects = (behind.get(source) for source in waits)
            behind[node] = node if touches(node) else next(filter(None, effects), node)
    return next((behind[v.node] for v in inputs if v.node in behind), None)


def _described(node: Node) -> str:
    """What a user knows a node with an effect by."""
    place = source_of(node)
    if any(key is not None for key in touches(node)):
        return f"a read or write of a Ref at {place}"
    return f"{node.primitive} at {place}, which has a side effect,"
