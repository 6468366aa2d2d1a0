"""Arrays on a mesh, whose types may say how they are sharded (a mesh with explicit axes)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hire_rewrite import _compat
from hire_rewrite.sharding.rows import Sharding, put


def packing_context(weights: Iterable[Any]) -> AbstractContextManager[Any]:
    """The context to pack in: a mesh that leaves open how arrays are sharded, if types say it."""
    typed = [sharding.mesh for sharding in map(_typed_sharding, weights) if sharding is not None]
    if not typed:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(_compat.automatic(typed[0]).abstract_mesh)


def automatic(array: Any) -> Any:
    """An array, or a shape, whose type says how it is sharded, as one whose type does not."""
    typed = _typed_sharding(array)
    if typed is None:
        return array
    sharding = NamedSharding(_compat.automatic(typed.mesh), typed.spec)
    if isinstance(array, jax.Array):
        return jax.device_put(array, sharding)
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def _typed_sharding(array: Any) -> NamedSharding | None:
    """How an array or a shape is sharded, if its type says so."""
    known = isinstance(array, jax.Array | jax.ShapeDtypeStruct)
    if not known or isinstance(array, jax.core.Tracer):
        return None
    sharding = array.sharding
    if isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types:
        return sharding
    return None


def on_mesh(array: Any, sharding: Sharding) -> Any:
    """An array that may lie on one device alone, on all of a mesh."""
    here = not isinstance(array, jax.core.Tracer) and isinstance(array.sharding, NamedSharding)
    return array if here else put(array, sharding.mesh, PartitionSpec())
