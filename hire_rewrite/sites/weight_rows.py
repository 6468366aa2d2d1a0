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
from hire_rewrite.ops.predictors import Predictor
from hire_rewrite.patterns.axes import Window
from hire_rewrite.patterns.linear import Linear
from hire_rewrite.patterns.region import Projection, Region
from hire_rewrite.sharding.rows import Sharding
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
        return _merged(self.experts(linear, window))

    def experts(self, linear: Linear, window: Window | None = None) -> jax.Array:
        """The same as [layers, experts, out, in]: devices may have some of the experts."""
        axes = linear.expert_axes(window)
        expert = None if axes is None else axes[1]
        value, axes_of = _untransposed(narrow(linear.weight))
        weight = self._stacker.stack(value, self._loops)
        first = () if expert is None else (expert,)
        order = (*first, *(a for a, _ in linear.free if a != expert), *linear.weight_in)
        unit = (axis for axis in range(len(linear.weight.shape)) if axis not in order)
        rows = jnp.transpose(weight, (0, *(axes_of[axis] + 1 for axis in (*order, *unit))))
        experts = 1 if expert is None else linear.weight.shape[expert]
        return rows.reshape(rows.shape[0], experts, -1, linear.in_dim)

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
        return _merged(self.expert_projections(projection))

    def expert_projections(self, projection: Projection) -> jax.Array:
        """The same as [layers, experts, n, in]."""
        linear, window = projection.linear, projection.window
        rows = self.experts(linear, window)
        read, first = [axis for axis in linear.out_axes if axis in window.axes], rows.shape[:2]
        rows = rows.reshape(*first, *(linear.out.shape[axis] for axis in read), -1)
        for i, axis in enumerate(read):
            rows = lax.slice_in_dim(rows, *window.cut(axis), axis=i + 2)
        return rows.reshape(*first, window.size, linear.in_dim)

    def vectors(self, region: Region) -> tuple[jax.Array, ...]:
        """The numbers of each position of a region, each [layers, n]."""
        vectors = []
        for vector in region.vectors:
            array = self._stacker.stack(vector.value, self._loops)
            for axis in vector.window.axes:
                array = lax.slice_in_dim(array, *vector.window.cut(axis), axis=axis + 1)
            vectors.append(array.reshape(array.shape[0], vector.window.size))
        return tuple(vectors)


def _merged(rows: jax.Array) -> jax.Array:
    """[layers, experts, ...] with both in one axis."""
    return rows.reshape(-1, *rows.shape[2:])


def _untransposed(value: Value) -> tuple[Value, tuple[int, ...]]:
    """What a value is a transposed view of, and which axis of that each of its axes is."""
    axes = tuple(range(len(value.shape)))
    while value.node is not None and value.node.primitive is p.transpose_p:
        permutation = value.node.params["permutation"]
        value, axes = value.node.ins[0], tuple(permutation[axis] for axis in axes)
    return value, axes


@jax.jit
def all_finite(array: jax.Array) -> jax.Array:
    """bool[], compiled so that no array of answers is held."""
    return jnp.isfinite(array).all()


def fit_predictor(
    predictor: Predictor,
    rows: jax.Array,
    moments: Moments | None,
    advance: Callable[[], None],
    top: int | None = None,
) -> Any:
    """The predictor's arrays for rows [layers, n, d], with a leading axis of layers."""

    if isinstance(rows, jax.core.Tracer):
        return map_layers(lambda own, seen: predictor.fit(own, seen, top), rows, moments)
    fits = []
    for layer in range(rows.shape[0]):
        own = jax.tree.map(operator.itemgetter(layer), moments)
        fits.append(jax.block_until_ready(_fit_layer(predictor, top, rows, layer, own)))
        advance()
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *fits)


def stored_rows(encoding: Encoding, rows: jax.Array) -> Stored:
    """What an encoding stores of rows [layers, n, d], exactly where it can."""
    exactly = (
        None if isinstance(rows, jax.core.Tracer) else encoding.store_exactly(np.asarray(rows))
    )
    if exactly is not None:
        return {name: jnp.asarray(array) for name, array in exactly.items()}
    stored: Stored = map_layers(lambda rows, _: encoding.store(rows), rows, None)
    return stored


def map_layers(function: Callable[..., Any], rows: jax.Array, more: Any) -> Any:
    """The results of `function` for each layer of rows and of another pytree, stacked."""
    if isinstance(rows, jax.core.Tracer):
        return lax.map(lambda both: function(*both), (rows, more))
    results = [
        function(rows[layer], jax.tree.map(operator.itemgetter(layer), more))
        for layer in range(rows.shape[0])
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fit_layer(
    predictor: Predictor, top: int | None, rows: jax.Array, layer: int, moments: Moments | None
) -> Any:
    """`predictor.fit` on a layer of rows, compiled once for all layers and sites of a size.

    A layer is cut out here: a head's is all of its rows, and would be copied.
    """
    return predictor.fit(lax.dynamic_index_in_dim(rows, layer, keepdims=False), moments, top)
