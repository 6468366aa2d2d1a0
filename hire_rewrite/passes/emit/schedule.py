"""Order the code of a scope for emission: what is kept, what is replaced, what is written again.

Replaced nodes are contracted to one *unit*; a call frame that nothing is replaced in stays one
equation; a frame that holds whole units becomes a call again, and one that holds a part of a unit
is spread out. The units are then sorted by what they read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from hire_rewrite.graph.calls import inline_calls
from hire_rewrite.graph.liveness import Liveness
from hire_rewrite.graph.nodes import Frame, Node, Scope, Value
from hire_rewrite.sharding.manual import ManualSharding

__all__ = ["Call", "Item", "Keep", "Loop", "Replacement", "Swap", "schedule"]


class Replacement(Protocol):
    """Code that takes the place of some nodes of one scope.

    `state` holds arrays of its own; `shards` is the `shard_map` around it, over whose devices their
    leading axis is spread. `loops` are the scans around it in whose iterations it has
    weights of its own; `reports` says whether it returns a report (statistics, say) besides its
    outputs.
    """

    @property
    def name(self) -> str: ...

    @property
    def nodes(self) -> frozenset[Node]: ...

    @property
    def inputs(self) -> tuple[Value, ...]: ...

    @property
    def outputs(self) -> tuple[Value, ...]: ...

    @property
    def state(self) -> Any: ...

    @property
    def shards(self) -> ManualSharding | None: ...

    @property
    def loops(self) -> tuple[Scope, ...]: ...

    @property
    def reports(self) -> bool: ...

    def emit(
        self, ins: Sequence[Any], index: Mapping[Scope, Any], state: Any
    ) -> tuple[list[Any], Any]:
        """Outputs and a report (None for none).

        Args:
          index: the iteration of each scan around.
          state: the arrays of `state`; inside a `shard_map`, this device's.
        """


@dataclasses.dataclass(frozen=True, eq=False)
class Keep:
    """A node or a whole call frame that is emitted as the jaxpr has it."""

    entry: Node | Frame

    @property
    def reads(self) -> Sequence[Value]:
        return self.entry.ins

    @property
    def writes(self) -> Sequence[Value]:
        return self.entry.outs


@dataclasses.dataclass(frozen=True, eq=False)
class Loop:
    """A loop or branch that is written again, since something in it changed."""

    node: Node
    reads: tuple[Value, ...]

    @property
    def writes(self) -> Sequence[Value]:
        return self.node.outs


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """A call frame that is written again around its changed body."""

    frame: Frame
    items: tuple[Item, ...]
    reads: tuple[Value, ...]
    writes: tuple[Value, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Swap:
    """A replacement."""

    replacement: Replacement

    @property
    def reads(self) -> Sequence[Value]:
        return self.replacement.inputs

    @property
    def writes(self) -> Sequence[Value]:
        return self.replacement.outputs


Item = Keep | Loop | Call | Swap


def schedule(scope: Scope, units: Mapping[Node, Replacement], live: Liveness) -> tuple[Item, ...]:
    """The items of a scope in an order in which each finds what it reads.

    Args:
      units: the replacement of each replaced node.
      live: what is needed once the units are replaced.
    """
    touched: set[Frame] = set()
    homes: dict[Frame, list[Replacement]] = {}
    for unit in dict.fromkeys(units[node] for node in scope.nodes if node in units):
        chains = [_frames(node.frame) for node in unit.nodes]
        common = [f for f in chains[0] if all(f in chain for chain in chains)]
        homes.setdefault(common[0], []).append(unit)
        for chain in chains:
            touched.update(chain[: chain.index(common[0])])  # these are spread out
    return _items(scope.root, _Context(units, live, homes, frozenset(touched)))


@dataclasses.dataclass(frozen=True)
class _Context:
    units: Mapping[Node, Replacement]
    live: Liveness
    homes: Mapping[Frame, list[Replacement]]
    spread: frozenset[Frame]

    def changed(self, entry: Node | Frame) -> bool:
        """Whether anything in it is replaced, at any depth."""
        if isinstance(entry, Frame):
            return any(self.changed(node) for node in entry.nodes())
        if entry in self.units:
            return True
        return any(
            node in self.units
            for body in entry.bodies
            for scope in body.scope.walk()
            for node in scope.nodes
        )

    def readable(self, values: Iterable[Value]) -> bool:
        return all(
            v in self.live.values or v.literal is not None or v.const is not None for v in values
        )

    def needed(self, entry: Node | Frame) -> bool:
        if isinstance(entry, Frame):
            return any(node in self.live.nodes for node in entry.nodes())
        return entry in self.live.nodes


def _items(frame: Frame, context: _Context) -> tuple[Item, ...]:
    items: list[Item] = [Swap(unit) for unit in context.homes.get(frame, ())]
    _collect(frame, context, items)
    graph = _graph(items)
    knots = _knots(items, graph)
    if knots:
        return _items(frame, dataclasses.replace(context, spread=context.spread | knots))
    return _sorted(items, graph)


def _collect(frame: Frame, context: _Context, items: list[Item]) -> None:
    for entry in frame.entries:
        if not context.needed(entry) or (isinstance(entry, Node) and entry in context.units):
            continue
        changed = context.changed(entry)
        whole = not changed and entry not in context.spread
        if whole and context.readable(entry.ins):
            items.append(Keep(entry))
        elif isinstance(entry, Node):
            reads = [v for body in entry.bodies for v in _linked(body, context)]
            items.append(Loop(entry, (*entry.controls, *dict.fromkeys(reads))))
        elif (
            changed
            and entry not in context.spread
            and inline_calls[entry.eqn.primitive].wrap(entry.eqn, _nothing) is not None
        ):
            items.append(_call(entry, context))
        else:
            items.extend(Swap(unit) for unit in context.homes.get(entry, ()))
            _collect(entry, context, items)


def _linked(body: Any, context: _Context) -> list[Value]:
    return [
        link.outer
        for value, link in zip(body.scope.inputs, body.inputs, strict=True)
        if value in context.live.values
    ]


def _nothing() -> None:
    """Stands for a body where only the form of the call is asked for."""


def _call(frame: Frame, context: _Context) -> Call:
    items = _items(frame, context)
    written = {value for item in items for value in item.writes}
    reads = dict.fromkeys(v for item in items for v in item.reads if v not in written)
    writes = dict.fromkeys(v for v in frame.outs if v in written and v in context.live.values)
    outside = (v for v in reads if v.literal is None and v.const is None)
    return Call(frame, items, tuple(outside), tuple(writes))


def _sorted(items: list[Item], graph: Any) -> tuple[Item, ...]:
    """The items in a topological order that stays close to the traced one."""
    import networkx as nx  # here, since importing it takes longer than all of this package

    place = [_place(item) for item in items]
    order = nx.lexicographical_topological_sort(graph, key=lambda i: place[i])
    return tuple(items[i] for i in order)


def _knots(items: Sequence[Item], graph: Any) -> set[Frame]:
    """Calls that both read and are read by a replacement, so that they cannot stay whole."""
    import networkx as nx

    cycles = [c for c in nx.strongly_connected_components(graph) if len(c) > 1]
    tied = [items[i] for cycle in cycles for i in cycle]
    frames = {item.frame for item in tied if isinstance(item, Call)}
    kept = (item.entry for item in tied if isinstance(item, Keep))
    return frames | {entry for entry in kept if isinstance(entry, Frame)}


def _graph(items: Sequence[Item]) -> Any:
    """Which item reads what which item writes."""
    import networkx as nx

    # A call may hand an operand through: then it is not the one that writes it.
    writer = {v: i for i, item in enumerate(items) for v in item.writes if v not in item.reads}
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(items)))
    for i, item in enumerate(items):
        graph.add_edges_from((writer[v], i) for v in item.reads if writer.get(v, i) != i)
    return graph


def _place(item: Item) -> int:
    """Where the traced function has the item, or the end of it."""
    if isinstance(item, Swap):
        return max(node.index for node in item.replacement.nodes)
    if isinstance(item, Loop):
        return item.node.index
    if isinstance(item, Call):
        return max(map(_place, item.items), default=0)
    if isinstance(item.entry, Node):
        return item.entry.index
    return max((node.index for node in item.entry.nodes()), default=0)


def _frames(frame: Frame | None) -> list[Frame]:
    """A frame and those around it, innermost first."""
    found = []
    while frame is not None:
        found.append(frame)
        frame = frame.parent
    return found
