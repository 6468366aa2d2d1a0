"""Where a value comes from: from weights alone, or from an activation too.

A *weight* is a value that depends on weight arguments, closed-over arrays and numbers alone,
whatever was done to it on the way: transposed, cast, dequantized, sliced by a `scan` or indexed by
a loop's counter. It is computed once, when the weights are packed.

Random numbers are no weights, even if their key is in one (dropout in training): another is to have
others. Those of a seed that is written in the program are the same for ever, and are constants.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.extend.core import primitives as p

from hire_rewrite import _compat
from hire_rewrite.graph.contents import contents
from hire_rewrite.graph.integers import (
    MOVES,
    READS_NUMBERS,
    Bounds,
    holds,
    is_integer,
    positions,
    range_of,
    result_bounds,
)
from hire_rewrite.graph.nodes import Body, Node, Scope, Value
from hire_rewrite.graph.sources import backward_slice, body_of, sources, sources_first
from hire_rewrite.graph.traits import Trait, has


class Provenance:
    """Which values of a function depend on weights alone.

    Args:
      root: the function's scope.
      weights: numbers of the function's inputs that hold weights.
      paths: names of the inputs, by which their identities are the same in other traces.
    """

    def __init__(
        self, root: Scope, weights: Collection[int], paths: Sequence[str] | None = None
    ) -> None:
        self._paths = dict(zip(root.inputs, paths or (), strict=False))
        self._weights: set[Value] = {root.inputs[i] for i in weights}
        self._constant: set[Value] = set()
        self._varies: dict[Value, frozenset[Scope]] = {}
        self._identities: dict[tuple[Scope, ...], dict[Value, str]] = {}
        self._bounds: dict[Value, Bounds] = {}
        self._visit(root)

    def is_weight(self, value: Value) -> bool:
        """Whether the value depends on weights (and constants) alone."""
        return value.is_constant or value in self._weights

    def roots(self, value: Value, within: Scope | None = None) -> list[Value]:
        """The inputs and constants that a weight is computed from, in order of discovery.

        Args:
          within: a scope around the value whose own inputs are asked for; None for the function's.
        """
        outermost = within.parent if within is not None else None
        return [
            source
            for source in backward_slice(value, within)
            if source.const is not None or (source.is_input and source.scope.parent is outermost)
        ]

    def identity(self, value: Value, loops: Sequence[Scope] | None = None) -> str:
        """Equal for weights that are computed alike from the same arrays, wherever they stand: a
        digest, which is as long whatever they are computed from.

        Args:
          loops: the scans over which the weight may vary, outermost first, which stand in it by
            their numbers; None for those over which it does. Other loops around it do not matter.
        """
        if loops is None:
            varying = self.varies_over(value)
            loops = [scope for scope in value.scope.ancestors() if scope in varying][::-1]
        known = self._identities.setdefault(tuple(loops), {})
        for each in sources_first(value, known):
            source = self._same_as(each)
            if source is not None:
                known[each] = known[source]
            else:
                told = repr(self._described(each, loops, known)).encode()
                known[each] = hashlib.blake2b(told, digest_size=16).hexdigest()
        return known[value]

    def _described(
        self, value: Value, loops: Sequence[Scope], known: Mapping[Value, str]
    ) -> Hashable:
        """What a value is told apart by: the operation that makes it, and the `known` identities of
        what that is given."""
        if value.const is not None:
            return "constant", contents(value.const)
        if value.literal is not None:
            if is_integer(value.aval):
                return "index", int(np.asarray(value.literal))
            return "literal", str(value.literal), str(value.dtype)
        if value.node is not None:
            node = value.node
            # Where numbers lie is no part of them: under a mesh `jax.vmap` says it of biases,
            # and `jax.shard_map` of what meets numbers that differ from device to device.
            params = {k: v for k, v in node.params.items() if not k.endswith("sharding")}
            places = self._bounds_of_result(node) if "index_dtype" in params else None
            if places and not value.shape and holds(value.dtype, places):
                del params["index_dtype"]  # the width of a single integer
            ins = tuple(known[operand] for operand in node.ins)
            integers = [v for v in node.ins if is_integer(v.aval)] if self._has_width(node) else ()
            widths = tuple(str(v.dtype) for v in integers)
            return str(node.primitive), _written(params), node.outs.index(value), ins, widths
        if value.scope.parent is None:
            return "array", self._paths.get(value, id(value))
        body, i = body_of(value)
        found: Hashable = known[body.inputs[i].outer]
        if body.inputs[i].role == "shard":
            found = (str(body.inputs[i].spec), value.scope.parent.params["mesh"], found)
        if value.scope not in self.varies_over(value):
            return found
        step = counter(body, i) if body.inputs[i].role == "carry" else None
        order: Hashable = step and (step, value.scope.parent.params.get("reverse"))
        if step and not holds(value.dtype, self._count(value, body, i)):
            order = order, str(value.dtype)
        return value.scope.length, loops.index(value.scope), order, found

    def varies_over(self, value: Value) -> frozenset[Scope]:
        """The scans around a weight from one iteration of which to the next it changes."""
        for each in sources_first(value, self._varies):
            scopes = frozenset[Scope]().union(*(self._varies[v] for v in sources(each)))
            if each.is_input and each.scope.parent is not None:
                body, i = body_of(each)
                role = body.inputs[i].role
                if role == "slice" or (role == "carry" and counter(body, i) is not None):
                    scopes |= {each.scope}
            self._varies[each] = scopes
        return self._varies[value]

    def _same_as(self, value: Value) -> Value | None:
        """What a value has all numbers of: whole in a body, elsewhere, or as an integer of another
        width."""
        if value.is_input and value.scope.parent is not None:
            body, i = body_of(value)
            varies = body.inputs[i].role == "shard" or value.scope in self.varies_over(value)
            return None if varies else body.inputs[i].outer
        if value.node is None:
            return None
        source = value.node.ins[0] if value.node.ins else None
        if source is None or has(value.node.primitive, Trait.SHARDS):
            return source
        if value.node.primitive is not p.convert_element_type_p or value.shape:
            return None
        integers = is_integer(source.aval) and is_integer(value.aval)
        return source if integers and holds(value.dtype, self._bounds_of(source)) else None

    def _has_width(self, node: Node) -> bool:
        """Whether a result depends on how wide integers are, and their identities do not say it."""
        integers = [v for v in node.ins if is_integer(v.aval)]
        if not integers or not all(map(self._is_index, integers)):
            return False
        if any(is_integer(v.aval) and not self._is_index(v) for v in node.outs):
            return True
        return node.primitive not in READS_NUMBERS and self._exact(node) is None

    def _is_index(self, value: Value) -> bool:
        """Whether it is an integer whose identity does not say how wide it is: a single one, or
        several laid out for a gather."""
        stack = [value]
        while stack:
            each = stack.pop()
            if not each.shape:
                continue
            moved = each.node is None or each.node.primitive in MOVES
            if not moved or not sources(each):
                return False
            stack += sources(each)
        return True

    def _exact(self, node: Node) -> Bounds | None:
        """Bounds of the result of arithmetic on single integers that does not wrap around."""
        out = node.outs[0]
        if out.shape or not all(is_integer(v.aval) for v in (*node.ins, out)):
            return None
        found = result_bounds(node.primitive, [*map(self._bounds_of, node.ins)])
        return found if found is not None and holds(out.dtype, found) else None

    def _bounds_of(self, value: Value) -> Bounds:
        """Between what numbers an integer, or each of an array, is."""
        for each in sources_first(value, self._bounds, lambda source: is_integer(source.aval)):
            found: Bounds | None = None
            if each.literal is not None:
                found = (int(np.asarray(each.literal)),) * 2
            elif each.node is not None:
                found = self._bounds_of_result(each.node)
            elif each.is_input and each.scope.parent is not None:
                body, i = body_of(each)
                if body.inputs[i].role != "carry" or carried_unchanged(body, i):
                    found = self._bounds[body.inputs[i].outer]
                elif counter(body, i) is not None:
                    found = self._count(each, body, i)
            known = found is not None and holds(each.dtype, found)
            self._bounds[each] = found if known and found is not None else range_of(each.dtype)
        return self._bounds[value]

    def _bounds_of_result(self, node: Node) -> Bounds | None:
        places = positions(node.primitive, node.params, node.ins[0].shape if node.ins else ())
        if places is not None:
            return places
        if node.primitive is p.convert_element_type_p and not is_integer(node.ins[0].aval):
            return None
        if node.primitive is p.select_n_p or node.primitive in MOVES | {p.convert_element_type_p}:
            cases = node.ins[1:] if node.primitive is p.select_n_p else node.ins
            bounds = [*map(self._bounds_of, cases)]
            return min(low for low, _ in bounds), max(high for _, high in bounds)
        return self._exact(node)

    def _count(self, value: Value, body: Body, i: int) -> Bounds:
        """Between what numbers a counter would be if it did not wrap around."""
        low, high = self._bounds_of(body.inputs[i].outer)
        steps = (counter(body, i) or 0) * max(0, (value.scope.length or 0) - 1)
        return low + min(0, steps), high + max(0, steps)

    def _visit(self, scope: Scope) -> None:
        for node in scope.nodes:
            for body in node.bodies:
                self._enter(body)
                self._visit(body.scope)
            if _compat.has_effects(node.eqn) or not all(map(self.is_weight, node.ins)):
                continue
            constant = all(map(self._is_constant, node.ins))
            if constant or not has(node.primitive, Trait.RANDOM):
                self._weights.update(node.outs)
            if constant:
                self._constant.update(node.outs)

    def _is_constant(self, value: Value) -> bool:
        """Whether the value depends on constants alone."""
        return value.is_constant or value in self._constant

    def _enter(self, body: Body) -> None:
        for i, (value, link) in enumerate(zip(body.scope.inputs, body.inputs, strict=True)):
            varying = link.role == "carry" and not carried_unchanged(body, i)
            if self.is_weight(link.outer) and (not varying or counter(body, i) is not None):
                self._weights.add(value)
                if self._is_constant(link.outer):
                    self._constant.add(value)


def _written(params: Mapping[str, Any]) -> str:
    """Parameters as text, in which sets have an order that is the same in every process."""
    return _SET.sub(lambda found: str(sorted(found[1].split(", "))), str(params))


_SET = re.compile(r"frozenset\(\{([^{}]*)\}\)")


def carried_unchanged(body: Body, i: int) -> bool:
    """Whether carry `i` of a loop's body leaves each iteration as it came in.

    The condition of a `while_loop` hands nothing on; its carries are judged by the body.
    """
    ends = _ends(body, i)
    return bool(ends) and all(end is start for start, end in ends)


def counter(body: Body, i: int) -> int | None:
    """What is added in each iteration to carry `i`, an integer, if its body does only that."""
    for start, end in _ends(body, i):
        node = end.node
        if node is None or node.primitive is not p.add_p or body.scope.length is None:
            return None
        others = [value for value in node.ins if value is not start]
        if len(others) != 1 or others[0].literal is None:
            return None
        if start.shape or not np.issubdtype(start.dtype, np.integer):
            return None
        return int(np.asarray(others[0].literal))
    return None


def _ends(body: Body, i: int) -> list[tuple[Value, Value]]:
    """(carry at the start, carry at the end) of the iteration that input `i` belongs to."""
    node = body.scope.parent
    assert node is not None
    number = node.bodies.index(body)
    return [
        (other.scope.inputs[k], end)
        for other in node.bodies
        for end, output in zip(other.scope.outputs, other.outputs, strict=True)
        if (number, i) in output.feeds
        for b, k in output.feeds
        if node.bodies[b] is other
    ]
