"""The code between linear layers that treats each neuron separately.

A region can be run again with any subset of the positions of its hidden axis, which is exactly
what predict-then-gather needs. (`grow` finds it.)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hire_rewrite.graph.evaluate import literal_array
from hire_rewrite.graph.nodes import Node, Value
from hire_rewrite.patterns.axes import axis_rules, rerun
from hire_rewrite.patterns.linear import Linear
from hire_rewrite.patterns.window import Window

__all__ = ["Projection", "Region", "Vector"]


@dataclasses.dataclass(frozen=True)
class Projection:
    """The outputs of a linear layer in a window of its result."""

    linear: Linear
    window: Window

    @property
    def weight_axis(self) -> int:
        """The axis of the weight whose rows are read."""
        assert self.window.axis is not None
        axis = self.linear.weight_axis(self.window.axis)
        assert axis is not None
        return axis

    @property
    def weight_picks(self) -> dict[int, int]:
        """Positions of the weight's other axes that are read alone."""
        found = {self.linear.weight_axis(i): position for i, position in self.window.picks}
        return {axis: position for axis, position in found.items() if axis is not None}


@dataclasses.dataclass(frozen=True)
class Vector:
    """A weight with one number for each position, for instance a bias.

    Where experts lie side by side it has one for each expert and position, or for each token.
    """

    value: Value
    window: Window

    @property
    def is_flat(self) -> bool:
        return self.window.tokens(self.value.shape) == 1


Key = tuple[Value, Window]
"""A value and where the region's positions are in it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Region:
    """Nodes that compute `value` separately for each position of `window`.

    `projections`, `vectors` and `sides` (values that are the same for all positions) are what it
    reads; `nodes` are those that it replaces, linear layers included. `siblings` are other parts
    of what its linear layers return, cut out by its nodes and read elsewhere (fused products).
    A region with a `selection` can be run on all of its positions only.
    """

    value: Value
    window: Window
    projections: tuple[Projection, ...]
    vectors: tuple[Vector, ...]
    sides: tuple[Value, ...]
    nodes: frozenset[Node]
    siblings: tuple[Region, ...] = ()
    reordered: Node | None = None
    """A node that puts the tokens into another order."""
    ranged: bool = False
    """Whether the positions are rounded to integers whose range is that of the greatest of them."""
    selection: frozenset[Node] = frozenset()
    """Those of the nodes that look at all positions together, to select some (a top-k)."""

    @property
    def axis(self) -> int:
        assert self.window.axis is not None
        return self.window.axis

    @property
    def size(self) -> int:
        return self.window.size

    @functools.cached_property
    def signature(self) -> Hashable:
        """Equal for regions that compute alike, whatever weights and layer they belong to."""
        names: dict[Value, Any] = {}
        for kind, values in (
            ("out", [item.linear.out for item in self.projections]),
            ("vector", [item.value for item in self.vectors]),
            ("side", self.sides),
        ):
            for i, value in enumerate(values):
                names.setdefault(value, (kind, i, value.aval.str_short()))
        windows = (
            *(item.window for item in self.projections),
            *(item.window for item in self.vectors),
            self.window,
        )
        code = []
        for node in sorted(self.nodes, key=lambda node: node.index):
            if node.outs[0] in names:
                continue
            ins = tuple(names.get(value) or _constant(value) for value in node.ins)
            params = tuple((name, repr(value)) for name, value in sorted(node.params.items()))
            code.append((node.primitive, params, ins, node in self.selection))
            names.update((v, (len(code), i, v.aval.str_short())) for i, v in enumerate(node.outs))
        return windows, tuple(code), names[self.value]

    def run(
        self,
        pre: Sequence[jax.Array],
        vectors: Sequence[jax.Array],
        sides: Mapping[Value, Any],
    ) -> jax.Array:
        """The value at `n` of the positions.

        Args:
          pre: for each projection [tokens, n], its outputs at those positions.
          vectors: for each vector [n].
          sides: the arrays that stand for the side inputs.

        Returns:
          [tokens, n]; the tokens are in the order of the value's other axes.
        """
        if self.selection:
            return self._run_whole(pre, vectors, sides)
        n = pre[0].shape[-1]
        done: dict[Key, Any] = {}
        for projection, array in zip(self.projections, pre, strict=True):
            done[projection.linear.out, projection.window] = _laid_out(
                array, projection.linear.out.shape, projection.window
            )
        for vector, array in zip(self.vectors, vectors, strict=True):
            shape = [1] * len(vector.value.shape)
            assert vector.window.axis is not None
            shape[vector.window.axis] = n
            full = vector.window.shape(vector.value.shape, n)
            done[vector.value, vector.window] = jnp.broadcast_to(array.reshape(shape), full)
        result = self._run((self.value, self.window), n, sides, done)
        return jnp.moveaxis(result, self.axis, -1).reshape(-1, n)

    def _run(self, key: Key, n: int, sides: Mapping[Value, Any], done: dict[Key, Any]) -> Any:
        if key in done:
            return done[key]
        value, window = key
        node = value.node
        assert node is not None
        rule, output = axis_rules[node.primitive], node.outs.index(value)
        operands = []
        for operand, inner in zip(node.ins, rule.operands(node, window, output), strict=True):
            if operand.literal is not None:
                operands.append(literal_array(operand))
            elif inner.axis is None:
                array: Any = operand.const if operand.const is not None else sides.get(operand)
                for axis, position in inner.picks:
                    array = lax.slice_in_dim(array, position, position + 1, axis=axis)
                operands.append(array)
            else:
                operands.append(self._run((operand, inner), n, sides, done))
        done[key] = rule.bind(node, window, n, operands, output)
        return done[key]

    def _run_whole(
        self, pre: Sequence[jax.Array], vectors: Sequence[jax.Array], sides: Mapping[Value, Any]
    ) -> jax.Array:
        """The value at all positions, by the function's own equations."""
        env: dict[Value, Any] = dict(sides)
        for projection, array in zip(self.projections, pre, strict=True):
            out, window = projection.linear.out, projection.window
            places = tuple(
                slice(*window.cut(axis)) if axis == window.axis or axis in window.picked else
                slice(None)
                for axis in range(len(out.shape))
            )  # fmt: skip
            full = env.get(out, jnp.zeros(out.shape, out.dtype))
            env[out] = full.at[places].set(_laid_out(array, out.shape, window))
        for vector, array in zip(self.vectors, vectors, strict=True):
            shape = vector.window.shape(vector.value.shape, self.size)
            env[vector.value] = array.reshape(shape)
        for node in sorted(self.nodes, key=lambda node: node.index):
            if node.outs[0] in env:
                continue
            _compute(node, env)
        return jnp.moveaxis(env[self.value], self.axis, -1).reshape(-1, self.size)


def _constant(value: Value) -> Hashable:
    if value.literal is not None:
        return str(value.literal), value.aval.str_short(), getattr(value.aval, "weak_type", False)
    return id(value.const if value.const is not None else value)


def _compute(node: Node, env: dict[Value, Any]) -> None:
    """Add the results of a node, and of what it reads that is made of side inputs alone."""
    operands = []
    for value in node.ins:
        if value.literal is not None:
            operands.append(literal_array(value))
            continue
        if value.const is None and value not in env:
            assert value.node is not None
            _compute(value.node, env)
        operands.append(value.const if value.const is not None else env[value])
    env.update(zip(node.outs, rerun(node, operands), strict=True))


def _laid_out(rows: jax.Array, shape: Sequence[int], window: Window) -> jax.Array:
    """[tokens, n] as an array that is `shape` outside its window."""
    assert window.axis is not None
    full = window.shape(shape, rows.shape[-1])
    others = [size for i, size in enumerate(full) if i != window.axis]
    return jnp.moveaxis(rows.reshape(*others, rows.shape[-1]), -1, window.axis)
