"""How a site's rows lie on a mesh: read from its weights, and kept when they are packed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hire_rewrite import _compat
from hire_rewrite.graph.nodes import Value, mesh_axes
from hire_rewrite.ops.ffn.sharded import Spread
from hire_rewrite.passes.trace import Trace, spread_sharding
from hire_rewrite.sites.ffn.match import FFNMatch
from hire_rewrite.sites.head.match import HeadMatch

__all__ = [
    "around_packing",
    "automatic",
    "on_mesh",
    "placement_of",
    "put",
    "put_rows",
    "shardings_of",
]


def placement_of(
    trace: Trace, match: FFNMatch | HeadMatch, default: Mesh | None
) -> tuple[Spread | None, str | None, bool]:
    """How a site's rows are spread, why it has to stay dense for that, if it has to, and whether
    its weights lie so.

    Matrices that are not spread are over all of the mesh `default`, if there is one and nothing
    speaks against it.
    """
    shardings = shardings_of(trace, (linear.weight for linear in match.linears))
    spread, itself = _spread_of(shardings, default), bool(shardings)
    obstacle = None if spread is None else _obstacle(match, spread)
    if len({sharding.mesh for sharding in shardings}) > 1:
        obstacle = "its weights are spread over several meshes"
    return (spread, obstacle, itself) if itself or obstacle is None else (None, None, False)


def _spread_of(shardings: Sequence[NamedSharding], default: Mesh | None) -> Spread | None:
    """All axes of the mesh over which a site's matrices are spread, in whichever direction.

    A matrix that is spread along its inputs (fully sharded storage) is packed spread along its
    rows: then each device still holds as much of it, and no row has to be gathered.
    """
    used = {name for sharding in shardings for name in mesh_axes(sharding.spec)}
    mesh = shardings[0].mesh if used else default
    if mesh is None:
        return None
    mesh = _compat.automatic(mesh)
    used = used or set(mesh.axis_names)
    axes = tuple(str(name) for name in mesh.axis_names if name in used and mesh.shape[name] > 1)
    spread = Spread(mesh, axes)
    return spread if spread.parts > 1 else None


def _obstacle(match: FFNMatch | HeadMatch, spread: Spread) -> str | None:
    """Why a site whose rows are spread has to stay dense, if it has to."""
    if isinstance(match, HeadMatch):
        places = ((value.shape, match.places[value]) for value in match.endpoints)
        if any((shape[axis], start) != (match.width, 0) for shape, (axis, start) in places):
            return f"its rows are spread over {spread}, and only a part of its logits is read"
        return None
    if match.experts > 1:
        return f"its experts are spread over {spread}"
    if match.region.siblings or match.piece.others:
        return f"its rows are spread over {spread}, and it shares a product with other layers"
    if match.activation.keeps is not None:
        return f"its rows are spread over {spread}, and it selects among all of them itself"
    return None


def put(array: Any, spread: Spread, spec: PartitionSpec) -> Any:
    """An array laid out on the mesh, a traced one too."""
    sharding = NamedSharding(spread.mesh, spec)
    if isinstance(array, jax.core.Tracer):
        return lax.with_sharding_constraint(array, sharding)
    return jax.device_put(array, sharding)


def put_rows(array: Any, spread: Spread, axis: int) -> Any:
    """An array with its rows, which lie along `axis`, on the devices that are to have them.

    Where other axes of it are spread, each device sends every other one its piece of their rows.
    The compiler's own way would be to gather the whole array on all devices first.
    """
    here = getattr(array, "sharding", None)
    if not isinstance(array, jax.core.Tracer) and isinstance(here, NamedSharding):
        parts = [*here.spec, *(None,) * (array.ndim - len(here.spec))]
        for other, part in enumerate(parts):
            if part is not None and other != axis:
                before, names = PartitionSpec(*parts), tuple(mesh_axes(part))
                parts[other], parts[axis] = None, (*mesh_axes(parts[axis]), *names)

                def exchange(piece: Any, names: Any = names, other: int = other) -> Any:
                    return lax.all_to_all(piece, names, axis, other, tiled=True)

                after = PartitionSpec(*parts)
                array = jax.jit(
                    jax.shard_map(exchange, mesh=here.mesh, in_specs=before, out_specs=after)
                )(array)
    return put(array, spread, spread.along(axis))


def around_packing(weights: Iterable[Any]) -> AbstractContextManager[Any]:
    """The context to pack in: where types say how arrays are spread, a mesh that leaves it open."""
    typed = [sharding.mesh for sharding in map(_typed_sharding, weights) if sharding is not None]
    if not typed:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(_compat.automatic(typed[0]).abstract_mesh)


def automatic(array: Any) -> Any:
    """An array, or a shape, whose type says how it is spread, as one whose type does not."""
    typed = _typed_sharding(array)
    if typed is None:
        return array
    sharding = NamedSharding(_compat.automatic(typed.mesh), typed.spec)
    if isinstance(array, jax.Array):
        return jax.device_put(array, sharding)
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def _typed_sharding(array: Any) -> NamedSharding | None:
    """How an array or a shape is spread, if its type says so."""
    known = isinstance(array, jax.Array | jax.ShapeDtypeStruct)
    if not known or isinstance(array, jax.core.Tracer):
        return None
    sharding = array.sharding
    if isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types:
        return sharding
    return None


def on_mesh(array: Any, spread: Spread) -> Any:
    """An array that may lie on one device alone, on all of a mesh."""
    here = not isinstance(array, jax.core.Tracer) and isinstance(array.sharding, NamedSharding)
    return array if here else put(array, spread, PartitionSpec())


def shardings_of(trace: Trace, weights: Iterable[Value]) -> list[NamedSharding]:
    """Of the inputs that weights are computed from, as far as they are spread."""
    roots = (root for weight in weights for root in trace.provenance.roots(weight))
    found = (trace.shardings.get(root) or spread_sharding(root.const) for root in roots)
    return [sharding for sharding in dict.fromkeys(found) if sharding is not None]
