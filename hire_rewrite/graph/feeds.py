"""Which of some marked equations read the results of which others, with anything in between."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator

from hire_rewrite.graph.nodes import Node, Scope, Value


def feeds(root: Scope, marked: Collection[Node]) -> dict[Node, tuple[Node, ...]]:
    """For each marked equation, in the order of the program, the nearest ones that it reads.

    One that is read through another one alone, or besides (as along a residual connection), is not
    named. Of a loop the first iteration counts.

    Args:
      marked: equations without bodies, in any scope.
    """
    reader = _Reader(marked)
    reader.visit(root)
    return {
        node: tuple(reader.order[i] for i in _bits(mask))
        for node, mask in zip(reader.order, reader.nearest, strict=True)
    }


@dataclasses.dataclass
class _Reader:
    """Sets of marked equations are integers, whose bit i stands for the i-th in order."""

    marked: Collection[Node]
    order: list[Node] = dataclasses.field(default_factory=list)
    nearest: list[int] = dataclasses.field(default_factory=list)
    above: list[int] = dataclasses.field(default_factory=list)
    reached: dict[Value, int] = dataclasses.field(default_factory=dict)

    def visit(self, scope: Scope) -> None:
        for node in scope.nodes:
            if node.bodies:
                self._visit_bodies(node)
                continue
            mask = self._nearest_of(node.ins)
            if node in self.marked:
                self.nearest.append(mask)
                self.above.append(mask | self._above(mask))
                mask = 1 << len(self.order)
                self.order.append(node)
            self._add(node.outs, mask)

    def _visit_bodies(self, node: Node) -> None:
        for body in node.bodies:
            for value, link in zip(body.scope.inputs, body.inputs, strict=True):
                self._add([value], self.reached.get(link.outer, 0))
            self.visit(body.scope)
        decides = self._nearest_of(node.controls)
        for body in node.bodies:
            for value, output in zip(body.scope.outputs, body.outputs, strict=True):
                if output.outer is not None:
                    out = node.outs[output.outer]
                    mask = self._reduced(self._nearest_of([value, out]) | decides)
                    self._add([out], mask)

    def _nearest_of(self, values: Iterable[Value]) -> int:
        mask = 0
        for value in values:
            mask |= self.reached.get(value, 0)
        return self._reduced(mask)

    def _reduced(self, mask: int) -> int:
        """Without those that others of them read."""
        return mask & ~self._above(mask) if mask & (mask - 1) else mask

    def _above(self, mask: int) -> int:
        above = 0
        for i in _bits(mask):
            above |= self.above[i]
        return above

    def _add(self, values: Iterable[Value], mask: int) -> None:
        if mask:
            for value in values:
                self.reached[value] = mask


def _bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
