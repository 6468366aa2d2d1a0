"""What is needed: values that reach a result or an effect, found from the results backward.

Generation loops carry whole forward passes that nobody reads, whose uses a matcher must not see;
and a weight that only a replaced product read is no longer needed.
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
    """The live values and nodes of a function whose `units` are replaced.

    Args:
      units: None to look into loops and calls for what they need themselves. Where nothing is
        replaced ({}) they stay as they are, and need all that they are given.
    """
    looks_inside = units is None or bool(units)
    units = units or {}
    ends = {max(unit.nodes, key=lambda node: node.index) for unit in units.values()}
    live = Liveness(set(), set(), set())

    def visit(scope: Scope, outputs: Collection[int]) -> None:
        live.values.update(scope.outputs[i] for i in outputs)
        live.results.update(scope.outputs[i] for i in outputs)
        for node in reversed(scope.nodes):
            if node in units:
                if node in ends:  # all that the unit reads was computed before its last node
                    live.nodes.update(units[node].nodes)
                    live.values.update(units[node].inputs)
            elif _compat.has_effects(node.eqn) or any(value in live.values for value in node.outs):
                live.nodes.add(node)
                if not looks_inside:
                    for frame in node.frame.around():
                        live.values.update(frame.ins)
                if node.bodies and looks_inside:
                    visit_bodies(node)
                else:
                    live.values.update(node.ins)

    def visit_bodies(node: Node) -> None:
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
                visit(body.scope, outputs)
            for body, outputs in zip(node.bodies, wanted, strict=True):
                for j, output in enumerate(body.outputs):
                    fed = [node.bodies[b].scope.inputs[i] for b, i in output.feeds]
                    if j in outputs:  # a carry that is read after the loop begins before it
                        live.values.update(fed)
                    elif any(value in live.values for value in fed):
                        outputs.add(j)
                        settled = False
        live.values.update(node.controls)
        for body in node.bodies:
            pairs = zip(body.scope.inputs, body.inputs, strict=True)
            live.values.update(link.outer for value, link in pairs if value in live.values)

    visit(root, range(len(root.outputs)))
    return live
