"""The code between linear layers that treats each neuron separately.

A region can be run again with any subset of the positions of its hidden axis, which is exactly
what predict-then-gather needs. (`slice` finds it.)
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hire_rewrite.graph.evaluate import evaluate_part, literal_array, look_up
from hire_rewrite.graph.nodes import Node, Value
from hire_rewrite.graph.traits import Trait, has
from hire_rewrite.patterns.axes import Blocked, Window, has_axis_rule, operand_windows, run_part
from hire_rewrite.patterns.linear import Linear


@dataclasses.dataclass(frozen=True)
class Projection:
    """The outputs of a linear layer in a window of its result."""

    linear: Linear
    window: Window


@dataclasses.dataclass(frozen=True)
class Vector:
    """A weight with one number for each position, for instance a bias."""

    value: Value
    window: Window

    @property
    def is_flat(self) -> bool:
        """Whether it is the same for all tokens and experts."""
        return self.window.tokens(self.value.shape) == 1

    @property
    def source(self) -> Vector:
        """The weight before it was laid out for tokens: the same whatever axes these have."""
        vector: Vector = self
        while vector.is_flat and vector.value.node is not None:
            node = vector.value.node
            moves = has(node.primitive, Trait.MOVES | Trait.KEEPS)
            if not (moves and has_axis_rule(node.primitive)):
                break
            try:
                window = operand_windows(node, vector.window)[0]
            except Blocked:
                break
            if window.axis is None or window.size != vector.window.size:
                break
            vector = Vector(node.ins[0], window)
        return vector


@dataclasses.dataclass(frozen=True, eq=False)
class Region:
    """Nodes that compute `value` separately for each position of `window`.

    Attributes:
      projections, vectors: the linear layers and weights that it reads, each in a window.
      sides: what else it reads: values that are the same for all positions.
      nodes: those that it replaces, linear layers included.
      siblings: other parts of what its linear layers return, cut out by its nodes and read
        elsewhere (fused products).
      selection: those of the nodes that look at all positions together, to select some (a top-k).
        With them the region runs on all of its positions only.
    """

    value: Value
    window: Window
    projections: tuple[Projection, ...]
    vectors: tuple[Vector, ...]
    sides: tuple[Value, ...]
    nodes: frozenset[Node]
    siblings: tuple[Region, ...] = ()
    selection: frozenset[Node] = frozenset()

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
        for node in self._ordered:
            if node.outs[0] in names:
                continue
            ins = tuple(names.get(value) or _constant(value) for value in node.ins)
            params = tuple((name, repr(value)) for name, value in sorted(node.params.items()))
            code.append((node.primitive, params, ins, node in self.selection))
            names.update((v, (len(code), i, v.aval.str_short())) for i, v in enumerate(node.outs))
        return windows, tuple(code), names[self.value]

    @property
    def _ordered(self) -> list[Node]:
        return sorted(self.nodes, key=lambda node: node.index)

    def run(
        self, pre: Sequence[jax.Array], vectors: Sequence[jax.Array], sides: Mapping[Value, Any]
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

        def side(value: Value, picks: Sequence[tuple[int, int]]) -> Any:
            array: Any = value.const if value.const is not None else sides.get(value)
            for axis, position in picks:
                array = lax.slice_in_dim(array, position, position + 1, axis=axis)
            return array

        return self._run(pre, vectors, side, lambda value: value.shape)

    def run_one_token(
        self,
        pre: Sequence[jax.Array],
        vectors: Sequence[jax.Array],
        side: Callable[[Value], jax.Array],
    ) -> jax.Array:
        """`run` for a single token, however many the function was traced with.

        Args:
          pre: for each projection [n].
          vectors: for each vector [n].
          side: for a side input an array of its rank with one number.

        Returns:
          [n].
        """
        rows = [array[None] for array in pre]
        return self._run(
            rows, vectors, lambda value, _: side(value), lambda value: (1,) * len(value.shape)
        )[0]

    def _run(
        self,
        pre: Sequence[jax.Array],
        vectors: Sequence[jax.Array],
        side: Callable[[Value, Sequence[tuple[int, int]]], Any],
        shape_of: Callable[[Value], Sequence[int]],
    ) -> jax.Array:
        n = pre[0].shape[-1]
        done: dict[tuple[Value, Window], Any] = {}
        for projection, rows in zip(self.projections, pre, strict=True):
            out, window = projection.linear.out, projection.window
            done[out, window] = _in_window(rows, shape_of(out), window)
        for vector, numbers in zip(self.vectors, vectors, strict=True):
            full = vector.window.shape(shape_of(vector.value), n)
            assert vector.window.axis is not None
            done[vector.value, vector.window] = lax.broadcast_in_dim(
                numbers, full, (vector.window.axis,)
            )

        def run(value: Value, window: Window) -> Any:
            if value.literal is not None:
                return literal_array(value)
            if window.axis is None:
                return side(value, window.picks)
            if (value, window) not in done:
                node = value.node
                assert node is not None
                output = node.outs.index(value)
                inners = operand_windows(node, window, output)
                operands = [run(*pair) for pair in zip(node.ins, inners, strict=True)]
                shape = window.shape(shape_of(value), n)
                done[value, window] = run_part(node, operands, shape, output)
            return done[value, window]

        return to_tokens(run(self.value, self.window), (self.axis,))

    def _run_whole(
        self, pre: Sequence[jax.Array], vectors: Sequence[jax.Array], sides: Mapping[Value, Any]
    ) -> jax.Array:
        """The value at all positions, by the function's own equations."""
        env: dict[Value, Any] = dict(sides)
        for projection, array in zip(self.projections, pre, strict=True):
            out, window = projection.linear.out, projection.window
            places = tuple(
                slice(*window.cut(axis)) if axis in window.axes else slice(None)
                for axis in range(len(out.shape))
            )
            full = env.get(out, jnp.zeros(out.shape, out.dtype))
            env[out] = full.at[places].set(_in_window(array, out.shape, window))
        for vector, array in zip(self.vectors, vectors, strict=True):
            shape = vector.window.shape(vector.value.shape, self.size)
            env[vector.value] = array.reshape(shape)
        for node in self._ordered:
            if node.outs[0] not in env:
                _compute(node, env)
        return to_tokens(env[self.value], (self.axis,))


def _constant(value: Value) -> Hashable:
    if value.literal is not None:
        return str(value.literal), value.aval.str_short(), getattr(value.aval, "weak_type", False)
    return id(value.const if value.const is not None else value)


def _compute(node: Node, env: dict[Value, Any]) -> None:
    """Add the results of a node, and of what it reads that is made of side inputs alone."""
    for value in node.ins:
        if not value.is_constant and value not in env:
            assert value.node is not None
            _compute(value.node, env)
    operands = [look_up(value, env) for value in node.ins]
    env.update(zip(node.outs, evaluate_part(node, operands), strict=True))


def _in_window(rows: jax.Array, shape: Sequence[int], window: Window) -> jax.Array:
    """[tokens, n] as an array that is `shape` outside its window."""
    assert window.axis is not None
    return from_tokens(rows, window.shape(shape, rows.shape[-1]), (window.axis,))


def to_tokens(array: Any, axes: Sequence[int]) -> Any:
    """[tokens, n] with `axes` merged to the last one and all others to the first."""
    size = math.prod(array.shape[axis] for axis in axes)
    others = [n for axis, n in enumerate(array.shape) if axis not in axes]
    return jnp.moveaxis(array, axes, range(-len(axes), 0)).reshape(math.prod(others), size)


def from_tokens(rows: Any, shape: Sequence[int], axes: Sequence[int]) -> Any:
    """[tokens, n] laid out as `shape`, n on `axes` of it."""
    others = [size for i, size in enumerate(shape) if i not in axes]
    split = rows.reshape(*others, *(shape[axis] for axis in axes))
    return jnp.moveaxis(split, range(-len(axes), 0), axes)


def without_axis(axes: Sequence[int], gone: int | None) -> list[int]:
    """Axes of an array as they are numbered without one of its axes (None for with all)."""
    return [axis - (gone is not None and axis > gone) for axis in axes]
