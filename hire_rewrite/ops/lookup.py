"""Rows by number of a weight that is sharded over the devices of a mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P

from hire_rewrite.sharding.rows import RowSharding

__all__ = ["sharded_lookup"]


def sharded_lookup(
    decode: Callable[[Any, Array | int, Array], Array],
    state: Any,
    layer: Array | int,
    places: Array,
    *,
    count: int,
    specs: Any,
    sharding: RowSharding,
) -> Array:
    """Rows of a weight [n, d] that is sharded over a mesh, f32[*places.shape, d].

    Each device decodes those that it has; the sum of all, one of which is not zero, is exact.

    Args:
      decode: (state, layer, numbers of rows) to the rows on one device.
      state: the packed arrays, sharded as `specs` says.
      places: i32[...], numbers of rows.
      count: how many rows a device has.
    """

    def on_shard(state: Any, layer: Array, places: Array) -> Array:
        if not sharding.rows:
            return decode(state, layer, places)
        own = places - lax.axis_index(sharding.rows) * count
        rows = decode(state, layer, jnp.clip(own, 0, count - 1))
        here = ((own >= 0) & (own < count))[..., None]
        return lax.psum(jnp.where(here, rows, 0), sharding.rows)

    found = P(*(None,) * places.ndim, sharding.columns)
    mapped: Any = sharding.map(on_shard, (specs, P(), P()), found)
    rows: Array = mapped(state, layer, places)
    return rows
