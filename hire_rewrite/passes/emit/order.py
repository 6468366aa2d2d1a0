"""The order of emission: each item after what it reads, and effects as the function has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.graph.effects import effect_edges
from hire_rewrite.graph.nodes import Frame
from hire_rewrite.passes.emit.items import Call, Item, Keep, Swap


def ordered(items: Sequence[Item]) -> tuple[Item, ...]:
    """The items in a topological order that stays close to the traced one.

    Raises:
      HireRewriteError: several sites would each have to run before the other.
    """
    import networkx as nx  # here, since importing it takes longer than all of this package

    graph = _graph(items)
    try:
        order = list(nx.lexicographical_topological_sort(graph, key=lambda i: items[i].place))
    except nx.NetworkXUnfeasible:
        tied = (items[i] for cycle in _cycles(graph) for i in cycle)
        names = sorted(item.replacement.name for item in tied if isinstance(item, Swap))
        raise HireRewriteError(
            f"{', '.join(names)} cannot be rewritten together: each has to run before another of "
            "them; exclude all but one with a rule's path="
        ) from None
    return tuple(items[i] for i in order)


def knots(items: Sequence[Item]) -> frozenset[Frame]:
    """Calls that both wait for and are waited for by another item: they cannot stay whole."""
    tied = [items[i] for cycle in _cycles(_graph(items)) for i in cycle]
    entries = (item.entry for item in tied if isinstance(item, Keep | Call))
    return frozenset(entry for entry in entries if isinstance(entry, Frame))


def _graph(items: Sequence[Item]) -> Any:
    """Which item has to run after which."""
    import networkx as nx

    # A call may hand an operand through: then it is not the one that writes it.
    writer = {v: i for i, item in enumerate(items) for v in item.writes if v not in item.reads}
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(items)))
    for i, item in enumerate(items):
        graph.add_edges_from((writer[v], i) for v in item.reads if writer.get(v, i) != i)
    traced = sorted(range(len(items)), key=lambda i: items[i].place)
    edges = effect_edges([items[i].nodes for i in traced])
    graph.add_edges_from((traced[i], traced[j]) for i, j in edges)
    return graph


def _cycles(graph: Any) -> list[set[int]]:
    import networkx as nx

    return [c for c in nx.strongly_connected_components(graph) if len(c) > 1]
