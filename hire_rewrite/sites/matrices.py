"""The matrices of a weight, encoded without a copy of all of them."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hire_rewrite.ops.encodings import Encoding, Stored
from hire_rewrite.sites.layers import map_layers


@dataclasses.dataclass(frozen=True)
class Matrices:
    """Matrices [n, d], one for each layer, as the model's weight holds them.

    A weight may be a good part of the memory, and its axes may lie in another order: so it is laid
    out as rows where it is read, a layer or less at a time.

    Attributes:
      array: the weight, with a leading axis of layers if it is `stacked`.
      axes: its axes but that of layers, counted without it: first those that make n, then those
        that make d.
      n_axes: how many of them make n.

    Examples:
      >>> from hire_rewrite.ops.encodings import Blocks
      >>> columns = jnp.arange(128.0).reshape(1, 32, 4)
      >>> matrices = Matrices(columns, (1, 0), 1)
      >>> matrices.on_host().shape, matrices.stored(Blocks(8))["integers"].shape
      ((1, 4, 32), (1, 4, 32))
    """

    array: Any
    axes: tuple[int, ...]
    n_axes: int
    stacked: bool = True

    @property
    def transposed(self) -> Matrices:
        """Their transposes [d, n]."""
        axes = (*self.axes[self.n_axes :], *self.axes[: self.n_axes])
        return dataclasses.replace(self, axes=axes, n_axes=len(axes) - self.n_axes)

    def on_host(self) -> np.ndarray:
        """[layers, n, d], a view of the weight where NumPy has one."""
        array = np.asarray(self.array)
        array = array if self.stacked else array[None]
        array = array.transpose(0, *(axis + 1 for axis in self.axes))
        n = math.prod(array.shape[1 : 1 + self.n_axes])
        return array.reshape(array.shape[0], n, -1)

    def stored(self, encoding: Encoding) -> Stored:
        """What an encoding stores of them, with a leading axis of layers; exactly where it can."""
        if not isinstance(self.array, jax.core.Tracer):
            exactly = encoding.store_exactly(self.on_host())
            if exactly is not None:
                return {name: jnp.asarray(array) for name, array in exactly.items()}
        how = encoding, self.axes, self.n_axes
        stored: Stored = (
            map_layers(_stored, how, self.array) if self.stacked else _stored_alone(how, self.array)
        )
        return stored


def _stored(how: tuple[Encoding, tuple[int, ...], int], weight: Array) -> Stored:
    encoding, axes, n_axes = how
    rows = jnp.transpose(weight, axes)
    return encoding.store(rows.reshape(math.prod(rows.shape[:n_axes]), -1))


@functools.partial(jax.jit, static_argnums=0)
def _stored_alone(how: tuple[Encoding, tuple[int, ...], int], weight: Array) -> Stored:
    """Of a weight without an axis of layers, as of layers [1, ...]: it is not copied for one."""
    return jax.tree.map(lambda part: part[None], _stored(how, weight))
