"""The order that effects have among each other.

Data alone tell when most code may run. Not so a callback that is ordered, or the reads and writes
of a `Ref`: they have to come in the order in which the function has them. What is unordered in JAX
(a plain `jax.debug.print`) is free here too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable, Iterator, Sequence

from hire_rewrite import _compat
from hire_rewrite.graph.nodes import Node


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
