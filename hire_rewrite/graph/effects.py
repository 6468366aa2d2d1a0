"""The order that effects have among each other, and what cannot be replaced because of them.

Ordered callbacks, and the reads and writes of a `Ref`, have to come in the order in which the
function has them. What is unordered in JAX (a plain `jax.debug.print`) is free here too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable, Iterator, Sequence

from hire_rewrite import _compat
from hire_rewrite.graph.nodes import Node, Value, source_of


def touches(node: Node) -> dict[Hashable, bool]:
    """The `Ref`s that a node reads or writes, and the world outside (None): whether it writes."""
    if not node.eqn.effects:
        return {}
    writes: dict[Hashable, bool] = {}
    for place, written in _compat.ordered_effects(node.eqn).items():
        value = None if place is None else node.ins[place]
        key = id(value.const) if value is not None and value.const is not None else value
        writes[key] = writes.get(key, False) or written
    return writes


def effect_edges(groups: Sequence[Collection[Node]]) -> Iterator[tuple[int, int]]:
    """Pairs (i, j) of groups of which the first has to run before the second.

    Args:
      groups: nodes that run together, in the order of the function.
    """
    writer: dict[Hashable, int] = {}
    readers: defaultdict[Hashable, list[int]] = defaultdict(list)
    for i, nodes in enumerate(groups):
        writes: dict[Hashable, bool] = {}
        for node in nodes:
            for key, written in touches(node).items():
                writes[key] = writes.get(key, False) or written
        for key, written in writes.items():
            yield from ((j, i) for j in readers[key] if written)
            if key in writer:
                yield writer[key], i
            if written:
                writer[key], readers[key] = i, []
            else:
                readers[key].append(i)


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
