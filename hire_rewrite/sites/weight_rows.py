"""A site's weights as rows, which packing lays out for gathering.

All arrays have a leading axis of layers: the iterations of the scans in which the site's weights
vary, times its experts.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import primitives as p

from hire_rewrite.graph.nodes import Scope, Value
from hire_rewrite.graph.weights import Stacker, narrow
from hire_rewrite.ops.encodings import Encoding, Stored
from hire_rewrite.ops.moments import Moments
from hire_rewrite.ops.predictors import Certifying, Predictor
from hire_rewrite.patterns.axes import Window
from hire_rewrite.patterns.linear import Linear
from hire_rewrite.patterns.region import Projection, Region
from hire_rewrite.sharding.rows import Sharding
from hire_rewrite.sites.layers import map_layers
from hire_rewrite.sites.matrices import Matrices


class WeightRows:
    """The rows of linear layers, and the vectors that belong to them.

    Args:
      stacker: evaluates the function's weights.
      loops: the scans in whose iterations the site's weights vary.
    """

    def __init__(self, stacker: Stacker, loops: tuple[Scope, ...]) -> None:
        self._stacker, self._loops = stacker, loops

    def linear(self, linear: Linear, window: Window | None = None) -> jax.Array:
        """A layer's weight as [layers · experts, out, in], as narrow as the model stores it.

        Args:
          window: what is read of its result, if not all.
        """
        array, axes, experts = self._weight(linear, window)
        return _laid_out(array, axes, (array.shape[0] * experts, -1, linear.in_dim))

    def experts(self, linear: Linear, window: Window | None = None) -> jax.Array:
        """The same as [layers, experts, out, in]: devices may have some of the experts."""
        array, axes, experts = self._weight(linear, window)
        return _laid_out(array, axes, (array.shape[0], experts, -1, linear.in_dim))

    def _weight(
        self, linear: Linear, window: Window | None
    ) -> tuple[jax.Array, tuple[int, ...], int]:
        """A layer's weight as the function has it, with an axis of layers; its axes in the order of
        layers, experts, out, in; and how many experts there are."""
        pair = linear.expert_axes(window)
        expert = None if pair is None else pair[1]
        value, axes_of = _untransposed(narrow(linear.weight))
        first = () if expert is None else (expert,)
        order = (*first, *(a for a, _ in linear.free if a != expert), *linear.weight_in)
        unit = (axis for axis in range(len(linear.weight.shape)) if axis not in order)
        axes = (0, *(axes_of[axis] + 1 for axis in (*order, *unit)))
        experts = 1 if expert is None else linear.weight.shape[expert]
        return self._stacker.stack(value, self._loops), axes, experts

    def matrices(self, linear: Linear) -> Matrices:
        """The same, laid out as they are read; a copy where there are experts."""
        if linear.batch:
            return Matrices(self.linear(linear), (0, 1), 1)
        value, axes_of = _untransposed(narrow(linear.weight))
        free = [axis for axis, _ in linear.free]
        inside = {*free, *linear.weight_in}
        unit = [axis for axis in range(len(linear.weight.shape)) if axis not in inside]
        axes = tuple(axes_of[axis] for axis in (*free, *unit, *linear.weight_in))
        whole = self._stacker(value)
        stacked = bool(self._loops or whole.over)
        array = self._stacker.stack(value, self._loops) if stacked else whole.array
        return Matrices(array, axes, len(free) + len(unit), stacked)

    def on_devices(self, rows: Callable[[WeightRows], Any], sharding: Sharding) -> Any:
        """What a function makes of these on each device of a manual region; of them where there is
        none."""
        return sharding.pack(
            lambda stacker, _: rows(WeightRows(stacker, self._loops)), self._stacker, None
        )

    def shards(self, linear: Linear, sharding: Sharding) -> jax.Array:
        """`linear` of each device's own rows and columns, [devices · layers, n, d]."""
        return sharding.shards(self.on_devices(lambda rows: rows.linear(linear), sharding))

    def projection(self, projection: Projection) -> jax.Array:
        """The rows of a layer that a projection reads, [layers · experts, n, in]."""
        return self._projection(projection, merged=True)

    def expert_projections(self, projection: Projection) -> jax.Array:
        """The same as [layers, experts, n, in]."""
        return self._projection(projection, merged=False)

    def _projection(self, projection: Projection, *, merged: bool) -> jax.Array:
        linear, window = projection.linear, projection.window
        array, axes, experts = self._weight(linear, window)
        first = (array.shape[0] * experts,) if merged else (array.shape[0], experts)
        read = [axis for axis in linear.out_axes if axis in window.axes]
        sizes = [linear.out.shape[axis] for axis in read]
        rows = _laid_out(array, axes, (*first, *sizes, linear.in_dim))
        cuts = [window.cut(axis) for axis in read]
        if len(read) == 1 and cuts == [(0, *sizes, 1)]:
            return rows
        places = tuple((i + len(first), *one) for i, one in enumerate(cuts))
        return _cut(rows, places, (*first, window.size, linear.in_dim))

    def vectors(self, region: Region) -> tuple[jax.Array, ...]:
        """The numbers of each position of a region, each [layers, n]."""
        vectors = []
        for vector in region.vectors:
            array = self._stacker.stack(vector.value, self._loops)
            for axis in vector.window.axes:
                array = lax.slice_in_dim(array, *vector.window.cut(axis), axis=axis + 1)
            vectors.append(array.reshape(array.shape[0], vector.window.size))
        return tuple(vectors)


def _laid_out(array: Any, axes: tuple[int, ...], shape: tuple[int, ...]) -> jax.Array:
    """A transposed array in another shape; the array itself if nothing changes."""
    alike = axes == tuple(range(len(axes))) and len(shape) == len(axes)
    if alike and all(new in (-1, old) for new, old in zip(shape, array.shape, strict=True)):
        return jnp.asarray(array)
    return _copied(array, axes, shape)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _copied(array: jax.Array, axes: tuple[int, ...], shape: tuple[int, ...]) -> jax.Array:
    """Compiled as a whole, so that a weight is copied once."""
    return jnp.transpose(array, axes).reshape(shape)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _cut(
    rows: jax.Array, cuts: tuple[tuple[int, int, int, int], ...], shape: tuple[int, ...]
) -> jax.Array:
    """What is left of rows in another shape; `cuts` are an axis, start, stop and stride each."""
    for axis, start, stop, stride in cuts:
        rows = lax.slice_in_dim(rows, start, stop, stride, axis)
    return rows.reshape(shape)


def _untransposed(value: Value) -> tuple[Value, tuple[int, ...]]:
    """What a value is a transposed view of, and which axis of that each of its axes is."""
    axes = tuple(range(len(value.shape)))
    while value.node is not None and value.node.primitive is p.transpose_p:
        permutation = value.node.params["permutation"]
        value, axes = value.node.ins[0], tuple(permutation[axis] for axis in axes)
    return value, axes


@jax.jit
def all_finite(arrays: Any) -> jax.Array:
    """bool[], of an array or a pytree of some; compiled so that no array of answers is held."""
    finite = [jnp.isfinite(array).all() for array in jax.tree.leaves(arrays)]
    return functools.reduce(operator.and_, finite, jnp.array(True))


def fit_predictor(
    predictor: Predictor,
    rows: jax.Array,
    moments: Moments | None,
    advance: Callable[[], None],
    top: int | None = None,
) -> Any:
    """The predictor's arrays for rows [layers, n, d], with a leading axis of layers."""
    return map_layers(_fit, (predictor, top), (rows, moments), advance)


def fit_bounds(predictor: Certifying, rows: jax.Array, arrays: Any) -> Any:
    """What a predictor needs to prove its guesses of rows [layers, n, d]; `arrays` are its own."""
    return map_layers(_fit_bound, predictor, (rows, arrays))


def stored_rows(encoding: Encoding, rows: jax.Array) -> Stored:
    """What an encoding stores of rows [layers, n, d], exactly where it can."""
    exactly = (
        None if isinstance(rows, jax.core.Tracer) else encoding.store_exactly(np.asarray(rows))
    )
    if exactly is not None:
        return {name: jnp.asarray(array) for name, array in exactly.items()}
    stored: Stored = map_layers(_store, encoding, rows)
    return stored


def _fit(how: tuple[Predictor, int | None], layer: tuple[jax.Array, Moments | None]) -> Any:
    (predictor, top), (rows, moments) = how, layer
    return predictor.fit(rows, moments, top)


def _fit_bound(predictor: Certifying, layer: tuple[jax.Array, Any]) -> Any:
    return predictor.fit_bound(*layer)


def _store(encoding: Encoding, rows: jax.Array) -> Stored:
    return encoding.store(rows)
