"""Order the code of a scope for emission: what is kept, what is replaced, what is written again.

The nodes of a replacement are contracted to one item. A call that nothing is replaced in stays one
equation; one that holds whole replacements becomes a call again, and one that holds a part of one
dissolves in its caller. The items are then sorted by what they read and by their effects.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.graph.calls import inline_call
from hire_rewrite.graph.effects import effect_edges
from hire_rewrite.graph.liveness import Liveness
from hire_rewrite.graph.nodes import Frame, Node, Scope, Value
from hire_rewrite.sites.replacement import SiteReplacement


@dataclasses.dataclass(frozen=True, eq=False)
class _Item:
    """A piece of code: the values that it reads and writes, and the nodes that it stands for."""

    reads: Sequence[Value]
    writes: Sequence[Value]
    nodes: Collection[Node]

    @property
    def place(self) -> int:
        """Where the traced function has it, or the end of it."""
        return max((node.index for node in self.nodes), default=0)


@dataclasses.dataclass(frozen=True, eq=False)
class Keep(_Item):
    """A node or a whole call that is emitted as the jaxpr has it."""

    entry: Node | Frame


@dataclasses.dataclass(frozen=True, eq=False)
class Loop(_Item):
    """A loop or branch that is written again, since something in it changed."""

    entry: Node


@dataclasses.dataclass(frozen=True, eq=False)
class Call(_Item):
    """A call that is written again around its changed body."""

    entry: Frame
    items: tuple[Item, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Swap(_Item):
    """A replacement."""

    replacement: SiteReplacement


Item = Keep | Loop | Call | Swap


def schedule(
    scope: Scope, units: Mapping[Node, SiteReplacement], live: Liveness
) -> tuple[Item, ...]:
    """The items of a scope in an order in which each finds what it reads.

    Args:
      units: the replacement of each replaced node.
      live: what is needed once the units are replaced.

    Raises:
      HireRewriteError: there is no such order.
    """
    dissolved: set[Frame] = set()
    homes: dict[Frame, list[SiteReplacement]] = {}
    for unit in dict.fromkeys(units[node] for node in scope.nodes if node in units):
        chains = [list(node.frame.around()) for node in unit.nodes]
        home = next(f for f in chains[0] if all(f in chain for chain in chains))
        homes.setdefault(home, []).append(unit)
        for chain in chains:
            dissolved.update(chain[: chain.index(home)])
    return _Scheduler(units, live, homes, frozenset(dissolved)).items(scope.root)


@dataclasses.dataclass(frozen=True)
class _Scheduler:
    """What decides how the code of one scope is cut into items.

    `homes` are the replacements by the innermost frame around all of their nodes, `dissolved` the
    calls that cannot stay calls.
    """

    units: Mapping[Node, SiteReplacement]
    live: Liveness
    homes: Mapping[Frame, list[SiteReplacement]]
    dissolved: frozenset[Frame]

    def items(self, frame: Frame) -> tuple[Item, ...]:
        """The items of a frame, in order."""
        items: list[Item] = []
        self._collect(frame, items)
        frames = _knots(items)
        if frames:
            again = dataclasses.replace(self, dissolved=self.dissolved | frames)
            return again.items(frame)
        return _ordered(items)

    def _collect(self, frame: Frame, items: list[Item]) -> None:
        for unit in self.homes.get(frame, ()):
            items.append(Swap(unit.inputs, unit.outputs, unit.nodes, unit))
        for entry in frame.entries:
            nodes = tuple(entry.nodes()) if isinstance(entry, Frame) else (entry,)
            if entry in self.units or self.live.nodes.isdisjoint(nodes):
                continue
            changed = self._changed(nodes)
            stays = entry not in self.dissolved
            if stays and not changed and all(map(self._readable, entry.ins)):
                items.append(Keep(entry.ins, entry.outs, nodes, entry))
            elif isinstance(entry, Node):
                linked = dict.fromkeys(
                    link.outer
                    for body in entry.bodies
                    for value, link in zip(body.scope.inputs, body.inputs, strict=True)
                    if value in self.live.values
                )
                items.append(Loop((*entry.controls, *linked), entry.outs, nodes, entry))
            elif stays and changed and not _dissolves(entry):
                items.append(self._call(entry, nodes))
            else:
                self._collect(entry, items)

    def _changed(self, nodes: Sequence[Node]) -> bool:
        """Whether anything in them is replaced, at any depth."""
        return any(inner in self.units for node in nodes for inner in node.walk())

    def _readable(self, value: Value) -> bool:
        return value in self.live.values or value.is_constant

    def _call(self, frame: Frame, nodes: Sequence[Node]) -> Call:
        items = self.items(frame)
        written = {value for item in items for value in item.writes}
        reads = dict.fromkeys(v for item in items for v in item.reads if v not in written)
        writes = dict.fromkeys(v for v in frame.outs if v in written and v in self.live.values)
        outside = (value for value in reads if not value.is_constant)
        return Call(tuple(outside), tuple(writes), nodes, frame, items)


def _dissolves(frame: Frame) -> bool:
    call = inline_call(frame.eqn)
    return call is None or call.dissolves


def _ordered(items: Sequence[Item]) -> tuple[Item, ...]:
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


def _knots(items: Sequence[Item]) -> frozenset[Frame]:
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
