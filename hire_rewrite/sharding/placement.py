"""How a site's weights lie on devices, read from the function's inputs and from types."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from jax.sharding import Mesh, NamedSharding

from hire_rewrite import _compat
from hire_rewrite.graph.nodes import Value
from hire_rewrite.graph.trace import Trace, sharding_over_mesh
from hire_rewrite.sharding.columns import column_axes
from hire_rewrite.sharding.manual import ManualSharding, exchanges_weights, manual_sharding
from hire_rewrite.sharding.rows import UNSHARDED, RowSharding, Sharding, mesh_axes, num_shards


def sharding_of(
    trace: Trace,
    x: Value,
    matrices: Sequence[Value],
    weights: Sequence[Value],
    outputs: Sequence[Value],
    default: Mesh | None,
    unsupported: Callable[[RowSharding], str | None],
    contracted: Sequence[int] = (),
    experts: Sequence[int] = (),
) -> tuple[Sharding, str | None, bool]:
    """How a site's weight rows lie on devices.

    Args:
      x: the site's input.
      matrices, weights: its matrices, and all of its weights.
      default: the mesh over all of whose axes rows are sharded that are not sharded by themselves.
      unsupported: why a site of this kind has to stay dense if its rows are sharded so.
      contracted: the axes of its only matrix along which it may be sharded as it is; where there
        are none, all of the mesh's axes are for its rows.
      experts: the axis of experts of each matrix, along which they may be sharded as they are.

    Returns:
      The sharding; why the site has to stay dense for it, if it has to; and whether it may as well
      not be sharded.
    """
    region, nested = manual_sharding(trace, x, weights)
    if region is not None:
        return region, _unsupported_region(trace, region, weights, outputs, nested=nested), False
    shardings = _shardings_of(trace, matrices)
    sharding = _row_sharding(shardings, default)
    if sharding is not None and contracted:
        names = column_axes(trace, matrices[0], contracted)
        columns = tuple(axis for axis in sharding.axes if axis in names)
        sharding = dataclasses.replace(sharding, columns=columns)
    if sharding is not None and experts:
        every = [column_axes(trace, m, (axis,)) for m, axis in zip(matrices, experts, strict=True)]
        apart = tuple(axis for axis in sharding.axes if all(axis in names for names in every))
        sharding = dataclasses.replace(sharding, experts=apart)
    if sharding is None:
        typed = (v.aval.sharding for v in weights if _compat.is_sharded_by_type(v.aval))
        divided = any(num_shards(sharding) > 1 for sharding in typed)
        types = "its weights are sharded by their types (a mesh with explicit axes)"
        return UNSHARDED, types if divided else None, False
    reason = unsupported(sharding)
    if len({item.mesh for item in shardings}) > 1:
        reason = "its weights are sharded over several meshes"
    if reason is not None and not shardings:
        return UNSHARDED, None, False
    return sharding, reason, not shardings


def _row_sharding(shardings: Sequence[NamedSharding], default: Mesh | None) -> RowSharding | None:
    """All axes of the mesh over which a site's matrices are sharded, in whichever direction: what
    is sharded along its inputs (fully sharded storage) is packed with sharded rows."""
    used = {name for sharding in shardings for name in mesh_axes(sharding.spec)}
    mesh = shardings[0].mesh if used else default
    if mesh is None:
        return None
    mesh = _compat.automatic(mesh)
    used = used or set(mesh.axis_names)
    axes = tuple(str(name) for name in mesh.axis_names if name in used and mesh.shape[name] > 1)
    sharding = RowSharding(mesh, axes)
    return sharding if sharding.num_shards > 1 else None


def _unsupported_region(
    trace: Trace,
    region: ManualSharding,
    weights: Sequence[Value],
    outputs: Sequence[Value],
    *,
    nested: bool,
) -> str | None:
    """Why a site in a manual region has to stay dense, if it has to."""
    over = f"inside shard_map over {', '.join(region.manual)}"
    if nested:
        return f"{over}, inside another shard_map"
    if any(exchanges_weights(value, region.scope) for value in weights):
        return f"{over}, where its weights are sent between devices"
    if any(_compat.explicit_spec(value.aval) is not None for value in outputs):
        return f"{over}, and types say how arrays lie along other axes"
    used = {name for item in _shardings_of(trace, weights) for name in mesh_axes(item.spec)}
    others = sorted(used - set(region.manual))
    if others:
        return f"{over}, and its weights are sharded over {', '.join(others)}"
    return None


def _shardings_of(trace: Trace, weights: Iterable[Value]) -> list[NamedSharding]:
    """Of the inputs that weights are computed from, as far as they are sharded."""
    roots = (root for weight in weights for root in trace.provenance.roots(weight))
    shardings = (trace.shardings.get(root) or sharding_over_mesh(root.const) for root in roots)
    return [sharding for sharding in dict.fromkeys(shardings) if sharding is not None]
