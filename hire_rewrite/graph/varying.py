"""Inside `shard_map`: along which axes of the mesh a value differs from device to device.

A value is the same along an axis if it is computed alike from values that are. Types say so too,
but for `shard_map`s with `check_vma=False`; this reads it from the code.
"""

from __future__ import annotations

from collections.abc import Iterable

from jax.extend.core import primitives as p

from hire_rewrite import _compat
from hire_rewrite.graph.nodes import Body, Node, Scope, Value
from hire_rewrite.graph.traits import Trait, has
from hire_rewrite.sharding.rows import mesh_axes

_ALIKE = Trait.MERGES | Trait.COLLECTS
"""What leaves the same on all devices along the axes that it names."""


class VaryingAxes:
    """For each value of a function, the mesh axes along which it differs."""

    def __init__(self, root: Scope) -> None:
        self._axes: dict[Value, frozenset[str]] = {}
        if any(_is_manual(node) for scope in root.walk() for node in scope.nodes):
            self._visit(root)

    def __getitem__(self, value: Value) -> frozenset[str]:
        return self._axes.get(value, frozenset())

    def _visit(self, scope: Scope) -> None:
        for node in scope.nodes:
            if node.bodies:
                self._visit_bodies(node)
            else:
                axes = self._any(node.ins)
                names = node.params.get("axes", node.params.get("axis_name"))
                if node.primitive is p.axis_index_p:
                    axes |= {*mesh_axes(names)}
                elif has(node.primitive, _ALIKE) and not node.params.get("axis_index_groups"):
                    axes -= {*(names if isinstance(names, tuple) else (names,))}
                self._add(node.outs, axes)

    def _visit_bodies(self, node: Node) -> None:
        manual = _is_manual(node)
        changed = True
        while changed:  # what a loop carries may differ from its second iteration on
            changed = False
            for body in node.bodies:
                for value, link in zip(body.scope.inputs, body.inputs, strict=True):
                    axes = self[link.outer] | {*mesh_axes(link.spec)}
                    changed |= self._add([value], axes)
                self._visit(body.scope)
            for body in node.bodies:
                changed |= self._hand_on(node, body, manual)
            changed = changed and any(
                output.feeds for body in node.bodies for output in body.outputs
            )

    def _hand_on(self, node: Node, body: Body, manual: bool) -> bool:
        """To the results of a node and the next iteration; whether anything was new."""
        decides = self._any(node.controls)
        changed = False
        for value, output in zip(body.scope.outputs, body.outputs, strict=True):
            axes = self[value] | decides
            if output.outer is not None and not manual:  # outside, arrays are whole
                changed |= self._add([node.outs[output.outer]], axes)
            elif output.outer is None:  # the condition of a loop decides how often it runs
                changed |= self._add(node.outs, axes)
            fed = [node.bodies[number].scope.inputs[i] for number, i in output.feeds]
            changed |= self._add(fed, axes)
        return changed

    def _any(self, values: Iterable[Value]) -> frozenset[str]:
        return frozenset[str]().union(*(self[value] for value in values))

    def _add(self, values: Iterable[Value], axes: frozenset[str]) -> bool:
        new = [value for value in values if not axes <= self[value]]
        self._axes.update((value, self[value] | axes) for value in new)
        return bool(new)


def _is_manual(node: Node) -> bool:
    return node.primitive is _compat.shard_map_p
