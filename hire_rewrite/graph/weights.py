"""Compute weights outside the loops that use them.

Inside a `scan` over layers a weight is one slice of a stacked array, and packing needs all slices:
`Stacker` evaluates weights with a leading axis for each scan over which they vary, under `vmap`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import primitives as p

from hire_rewrite.graph.evaluate import evaluate_inside, literal_array
from hire_rewrite.graph.nodes import Node, Scope, Value
from hire_rewrite.graph.provenance import counter
from hire_rewrite.graph.sources import body_of, sources_first
from hire_rewrite.graph.traits import is_widening
from hire_rewrite.sharding.rows import automatic


@dataclasses.dataclass(frozen=True)
class Stacked:
    """A value in all iterations: `array` has a leading axis for each of the scans `over`."""

    array: jax.Array
    over: tuple[Scope, ...]


class Stacker:
    """Evaluates weights of a function.

    Args:
      inputs: what stands for the function's inputs, as far as they are weights.
    """

    def __init__(self, inputs: Mapping[Value, Stacked]) -> None:
        self._done = {
            value: Stacked(automatic(item.array), item.over) for value, item in inputs.items()
        }
        self._ran: set[Node] = set()

    def stack(self, value: Value, over: Sequence[Scope]) -> jax.Array:
        """The value with one leading axis for the iterations of the scans `over`, in row-major
        order ([1, ...] if there are none)."""
        stacked = self(value)
        array, axes = stacked.array, list(stacked.over)
        for position, scope in enumerate(over):
            if scope not in axes:
                assert scope.length is not None
                array = jnp.broadcast_to(
                    jnp.expand_dims(array, position),
                    (*array.shape[:position], scope.length, *array.shape[position:]),
                )
                axes.insert(position, scope)
        size = math.prod(array.shape[: len(axes)])
        return array.reshape(size, *array.shape[len(axes) :])

    def __call__(self, value: Value) -> Stacked:
        for each in sources_first(value, self._done):
            if each.node is not None:
                self._compute(each.node)
            elif each.is_input:
                self._done[each] = self._input(each)
            else:
                array = literal_array(each) if each.const is None else jnp.asarray(each.const)
                self._done[each] = Stacked(array, ())
        return self._done[value]

    def _compute(self, node: Node) -> None:
        """Add the results of an equation whose operands are there."""
        ins = [self._done[operand] for operand in node.ins]
        over = loops_of(node.scope, {scope for item in ins for scope in item.over})

        def run(*arrays: Any) -> Any:
            return tuple(evaluate_inside(node, arrays))

        mapped = run
        for scope in reversed(over):
            mapped = jax.vmap(mapped, in_axes=tuple(0 if scope in i.over else None for i in ins))
        for result, array in zip(node.outs, mapped(*(i.array for i in ins)), strict=True):
            self._done[result] = Stacked(array, over)
        self._ran.add(node)
        for operand in node.ins:  # what nobody else reads need not be held
            if operand.node in self._ran and all(user in self._ran for user, _ in operand.users):
                self._done.pop(operand, None)

    def _input(self, value: Value) -> Stacked:
        """An input of a loop's or branch's body, which is made of what is there."""
        body, i = body_of(value)
        link = body.inputs[i]
        outer = self._done[link.outer]
        if link.role == "slice":
            return Stacked(outer.array, (*outer.over, value.scope))
        step = counter(body, i) if link.role == "carry" else None
        if step is None:
            return outer
        assert value.scope.length is not None
        assert value.scope.parent is not None
        steps = step * jnp.arange(value.scope.length, dtype=value.dtype)
        if value.scope.parent.params.get("reverse"):  # slices come last to first
            steps = steps[::-1]
        return Stacked(jnp.asarray(outer.array)[..., None] + steps, (*outer.over, value.scope))


def narrow(value: Value) -> Value:
    """The value before casts to a wider float: they lose nothing, and come again after reading."""
    while (
        value.node is not None
        and value.node.primitive is p.convert_element_type_p
        and is_widening(value.node.ins[0].dtype, value.dtype)
    ):
        value = value.node.ins[0]
    return value


def loops_of(scope: Scope, varying: set[Scope]) -> tuple[Scope, ...]:
    """Those of the scopes around `scope` over which something varies, outermost first."""
    return tuple(reversed([s for s in scope.ancestors() if s in varying]))
