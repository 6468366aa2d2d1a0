"""What the code of a scope is emitted from."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from hire_rewrite.graph.nodes import Frame, Node, Scope, Value
from hire_rewrite.sharding.manual import ManualSharding


class Replacement(Protocol):
    """Code that takes the place of some nodes of one scope.

    `state` holds arrays of its own; `shards` is the `shard_map` around it, over whose devices their
    leading axis is sharded. `loops` are the scans around it in whose iterations it has
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

    replacement: Replacement


Item = Keep | Loop | Call | Swap
