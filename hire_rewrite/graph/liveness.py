"""What is needed: values that reach a result or an effect, found from the results backward.

Generation loops carry whole forward passes that nobody reads; a matcher that looked at them
would see uses that do not exist. The same question is asked again after sites are chosen: a
weight that only a replaced product read is no longer needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Protocol

from hire_rewrite import _compat
from hire_rewrite.graph.nodes import Node, Scope, Value


class Unit(Protocol):
    """Nodes that are replaced together, and what their replacement reads."""

    @property
    def nodes(self) -> Collection[Node]: ...

    @property
    def inputs(self) -> Collection[Value]: ...


@dataclasses.dataclass(frozen=True)
class Liveness:
    values: set[Value]
    nodes: set[Node]
    results: set[Value]
    """Live values that are results of their scope."""

    def users(self, value: Value) -> list[tuple[Node, int]]:
        """The live nodes that read a value, with the operand's position."""
        return [(node, position) for node, position in value.users if node in self.nodes]


def liveness(root: Scope, units: Mapping[Node, Unit] | None = None) -> Liveness:
    """The live values and nodes of a function whose `units` are replaced."""
    units = units or {}
    ends = {max(unit.nodes, key=lambda node: node.index): unit for unit in units.values()}
    live = Liveness(set(), set(), set())
    _visit(root, range(len(root.outputs)), units, ends, live)
    return live


def _visit(
    scope: Scope,
    outputs: Collection[int],
    units: Mapping[Node, Unit],
    ends: Mapping[Node, Unit],
    live: Liveness,
) -> None:
    live.values.update(scope.outputs[i] for i in outputs)
    live.results.update(scope.outputs[i] for i in outputs)
    for node in reversed(scope.nodes):
        if node in units:
            if node in ends:  # all that the unit reads was computed before its last node
                live.nodes.update(units[node].nodes)
                live.values.update(units[node].inputs)
        elif _compat.has_effects(node.eqn) or any(value in live.values for value in node.outs):
            live.nodes.add(node)
            if node.bodies:
                _visit_bodies(node, units, ends, live)
            else:
                live.values.update(node.ins)


def _visit_bodies(
    node: Node, units: Mapping[Node, Unit], ends: Mapping[Node, Unit], live: Liveness
) -> None:
    """Live operands of a loop or branch: repeat until the carried values settle."""
    wanted = [
        {
            j
            for j, output in enumerate(body.outputs)
            if output.outer is None or node.outs[output.outer] in live.values
        }
        for body in node.bodies
    ]
    settled = False
    while not settled:
        settled = True
        for body, outputs in zip(node.bodies, wanted, strict=True):
            _visit(body.scope, outputs, units, ends, live)
        for body, outputs in zip(node.bodies, wanted, strict=True):
            for j in outputs:  # a carry that is read after the loop begins before it
                feeds = body.outputs[j].feeds
                live.values.update(node.bodies[b].scope.inputs[i] for b, i in feeds)
            for j, output in enumerate(body.outputs):
                held = (node.bodies[b].scope.inputs[i] for b, i in output.feeds)
                if j not in outputs and any(value in live.values for value in held):
                    outputs.add(j)
                    settled = False
    live.values.update(node.controls)
    for body in node.bodies:
        for value, link in zip(body.scope.inputs, body.inputs, strict=True):
            if value in live.values:
                live.values.add(link.outer)
