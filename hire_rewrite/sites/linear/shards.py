"""The shards of a weight, each encoded by itself.

A device encodes the rows and columns that it has: nothing is gathered, and blocks end where shards
do. Arrays have the devices on their leading axis, `[devices · layers, ...]`, over a mesh and in a
manual region alike (see `Sharding.shards`).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from hire_rewrite import _compat
from hire_rewrite.errors import HireRewriteError
from hire_rewrite.ops.encodings import Encoding, Float, Stored, narrowest
from hire_rewrite.patterns.linear import Linear
from hire_rewrite.sharding.rows import RowSharding, Sharding
from hire_rewrite.sites.matrices import Matrices
from hire_rewrite.sites.weight_rows import WeightRows


def shard_size(linear: Linear, sharding: Sharding) -> tuple[int, int]:
    """The rows and columns n × d of a layer's weight that a device has, rounded up."""
    columns = sharding.num_columns if isinstance(sharding, RowSharding) else 1
    rows = sharding.num_shards // columns
    return -(-linear.out_dim // rows), -(-linear.in_dim // columns)


def narrowest_of_shards(weights: WeightRows, linear: Linear, sharding: Sharding) -> Encoding | None:
    """The narrowest encoding that holds each shard of a layer's weight exactly; None for none, and
    where this process does not have all of them."""
    shards = weights.shards(linear, sharding)
    if not shards.is_fully_addressable:
        return None
    found = narrowest(np.asarray(shards))
    if found is not None:
        return found[0]
    if not isinstance(sharding, RowSharding) or not sharding.columns:
        return None
    # Blocks may be cut by the shards' ends: then rows are kept whole.
    whole = sharding.of_whole_rows
    if linear.out_dim % whole.num_shards:
        return None
    encoding = narrowest_of_shards(weights, linear, whole)
    try:
        if encoding is not None:
            encoding.check(*shard_size(linear, sharding))
    except HireRewriteError:
        return encoding
    return None  # it would be taken for the shards, which it does not hold


def stored_shards(
    shards: Array, encoding: Encoding, sharding: Sharding, *, transposed: bool = False
) -> Stored:
    """What an encoding stores of each shard, [devices · layers, ...]; exactly where it can.

    Args:
      shards: [devices · layers, n, d].
      transposed: whether columns are stored as rows.
    """
    traced = isinstance(shards, jax.core.Tracer)
    lies = None if traced else shards.sharding
    mesh = lies.mesh if isinstance(lies, NamedSharding) else sharding.mesh
    where = _compat.mesh_around(mesh), sharding.axes
    stored: Stored = _store_all(shards, encoding, transposed, *where)
    if traced or isinstance(encoding, Float):  # which stores exactly what it can
        return stored
    exact: dict[str, Stored | None] = {}
    of_device = {}
    for shard in shards.addressable_shards:
        place = str(shard.index)  # devices may have equal ones
        if place not in exact:
            matrices = _matrices(np.asarray(shard.data), transposed)
            exact[place] = encoding.store_exactly(matrices.on_host())
        of_device[shard.device] = exact[place]
    return {name: _replaced(array, name, of_device) for name, array in stored.items()}


def _replaced(array: Array, name: str, exact: dict[Any, Stored | None]) -> Array:
    """The array with the shards that were stored exactly, by device, in the place of its own."""
    parts = []
    for shard in array.addressable_shards:
        found = exact[shard.device]
        parts.append(shard.data if found is None else jax.device_put(found[name], shard.device))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _store_all(
    shards: Array, encoding: Encoding, transposed: bool, mesh: Any, axes: tuple[str, ...]
) -> Stored:
    """What an encoding stores of all shards, compiled once for layers of a size."""
    spec = PartitionSpec(axes)
    store: Any = jax.shard_map(
        lambda shard: _matrices(shard, transposed).stored(encoding),
        mesh=mesh,
        in_specs=spec,
        out_specs=spec,
        check_vma=False,
    )
    stored: Stored = store(shards)
    return stored


def _matrices(shard: Any, transposed: bool) -> Matrices:
    matrices = Matrices(shard, (0, 1), 1)
    return matrices.transposed if transposed else matrices
