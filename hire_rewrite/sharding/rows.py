"""Weight rows on devices: together, or sharded over axes of a mesh."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import jax
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from hire_rewrite import _compat


class Sharding:
    """How a site's weight rows lie on devices; by itself: not sharded.

    Attributes:
      mesh: the mesh that they lie on, or None.
      axes: its axes over which they are sharded, the major one first.
      region: the function's own `shard_map` around the site, or None (see `manual`).
    """

    mesh: Any = None
    axes: tuple[str, ...] = ()
    region: Any = None

    def __str__(self) -> str:
        return " × ".join(f"{axis}={self.mesh.shape[axis]}" for axis in self.axes)

    @property
    def num_shards(self) -> int:
        """How many devices share the rows that the site's operation sees."""
        return 1

    @property
    def expert_shards(self) -> int:
        """Among how many devices a site's experts are divided."""
        return 1

    @property
    def row_shards(self) -> int:
        """Among how many devices the rows of one expert are divided."""
        return 1

    @property
    def vocabulary_shards(self) -> int:
        """Into how many shards a vocabulary is divided of which the operation sees one."""
        return 1

    def describe(self) -> str:
        """What a plan adds to a site's reason."""
        return ""

    def put_rows(self, array: Any, axis: int) -> Any:
        """An array with its weight rows, which lie along `axis`, on the devices that hold them."""
        return array

    def shards(self, rows: Any) -> Any:
        """Weight rows [layers, n, d] as each device's own, [devices · layers, n, d] of these."""
        return rows

    def device_blocks(self, rows: Any, axis: int) -> Any:
        """Weight rows [layers, experts, ...], which lie along `axis`, as each device's own: of all
        devices, one after the other, the layers, and of each the experts."""
        return rows.reshape(-1, *rows.shape[2:])

    def put(self, arrays: Any, specs: Callable[[Any], Any]) -> Any:
        """Packed arrays on the devices that hold them; `specs` are their partition specs."""
        return arrays

    def shardings(self, arrays: Any, specs: Callable[[Any], Any]) -> Any:
        """The `NamedSharding` of each packed array; None where none is set."""
        return None

    def pack(self, pack: Callable[[Any, Any], Any], weights: Any, calibration: Any) -> Any:
        """What `pack` makes of the function's weights (a `Stacker`) and of a calibration."""
        return pack(weights, calibration)


UNSHARDED = Sharding()


@dataclasses.dataclass(frozen=True)
class RowSharding(Sharding):
    """Weight rows sharded over all of the `axes` of a mesh together, the major one first.

    Each device guesses, chooses and gathers among its own rows, in a `shard_map`.

    Attributes:
      columns: those of the axes over which not the rows are sharded, but their columns (of kinds of
        sites that ask for it: see `SiteKind.divides_columns`).
      experts: those over which experts are, each with all of its rows (see
        `SiteKind.expert_axes`).
    """

    mesh: Mesh | AbstractMesh
    axes: tuple[str, ...]
    columns: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()

    @property
    def num_shards(self) -> int:
        return math.prod(self.mesh.shape[axis] for axis in self.axes)

    @property
    def num_columns(self) -> int:
        """How many shards each row is cut into."""
        return math.prod(self.mesh.shape[axis] for axis in self.columns)

    @property
    def expert_shards(self) -> int:
        return math.prod(self.mesh.shape[axis] for axis in self.experts)

    @property
    def row_shards(self) -> int:
        return math.prod(self.mesh.shape[axis] for axis in self.rows)

    @property
    def rows(self) -> tuple[str, ...]:
        """The axes over which rows are sharded."""
        return tuple(axis for axis in self.axes if axis not in (*self.columns, *self.experts))

    @property
    def of_whole_rows(self) -> RowSharding:
        """The same devices, each with some rows and all of their columns."""
        return dataclasses.replace(self, columns=())

    def describe(self) -> str:
        return f", sharded over {self}"

    def along(self, axis: int) -> PartitionSpec:
        """Of an array whose axis `axis` is sharded."""
        return PartitionSpec(*(None,) * axis, self.axes)

    def token_axes(self, tokens: int) -> tuple[str, ...]:
        """The other axes of the mesh, for so many tokens; none if they do not divide them."""
        others = tuple(str(axis) for axis in self.mesh.axis_names if axis not in self.axes)
        size = math.prod(self.mesh.shape[axis] for axis in others)
        return others if isinstance(tokens, int) and tokens % size == 0 else ()

    def token_shards(self, tokens: int) -> int:
        return math.prod(self.mesh.shape[axis] for axis in self.token_axes(tokens))

    def map(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Any:
        """`function` on each device, of its shards of the arguments."""
        mesh, specs = _compat.mesh_around(self.mesh), {"in_specs": in_specs, "out_specs": out_specs}
        return jax.shard_map(function, mesh=mesh, check_vma=False, **specs)

    def put_rows(self, array: Any, axis: int) -> Any:
        """See `Sharding.put_rows`."""
        return put(self._exchanged(array, axis), self.mesh, self.along(axis))

    def _exchanged(self, array: Any, axis: int, kept: int | None = None) -> Any:
        """An array of which no other axis than `axis`, and the one that is kept, is sharded.

        Where others are, each device sends every other one its part of their rows. The compiler's
        own way would be to gather the whole array on all devices first.
        """
        here = getattr(array, "sharding", None)
        if not isinstance(array, jax.core.Tracer) and isinstance(here, NamedSharding):
            parts = [*here.spec, *(None,) * (array.ndim - len(here.spec))]
            for other, part in enumerate(parts):
                if part is not None and other not in (axis, kept):
                    before, names = PartitionSpec(*parts), tuple(mesh_axes(part))
                    parts[other], parts[axis] = None, (*mesh_axes(parts[axis]), *names)

                    def exchange(shard: Any, names: Any = names, other: int = other) -> Any:
                        return lax.all_to_all(shard, names, axis, other, tiled=True)

                    after = PartitionSpec(*parts)
                    array = jax.jit(
                        jax.shard_map(exchange, mesh=here.mesh, in_specs=before, out_specs=after)
                    )(array)
        return array

    def device_blocks(self, rows: Any, axis: int) -> Any:
        parts: list[Any] = [None] * rows.ndim
        parts[1], parts[axis] = self.experts, self.rows
        before = PartitionSpec(*parts)
        rows = put(self._exchanged(rows, axis, 1), self.mesh, before)

        def own(shard: Any) -> Any:
            return shard.reshape(-1, *shard.shape[2:])

        return jax.jit(self.map(own, before, PartitionSpec(self.axes)))(rows)

    def shards(self, rows: Any) -> Any:
        spec = PartitionSpec(None, self.rows, self.columns)
        rows = put(rows, self.mesh, spec) if self.columns else self.put_rows(rows, 1)
        return jax.jit(self.map(lambda shard: shard, spec, PartitionSpec(self.axes)))(rows)

    def put(self, arrays: Any, specs: Callable[[Any], Any]) -> Any:
        return jax.tree.map(lambda array, spec: put(array, self.mesh, spec), arrays, specs(arrays))

    def shardings(self, arrays: Any, specs: Callable[[Any], Any]) -> Any:
        return jax.tree.map(lambda _, spec: NamedSharding(self.mesh, spec), arrays, specs(arrays))


def put(array: Any, mesh: Mesh | AbstractMesh, spec: PartitionSpec) -> Any:
    """An array laid out on a mesh, a traced one too."""
    sharding = NamedSharding(mesh, spec)
    if isinstance(array, jax.core.Tracer):
        return lax.with_sharding_constraint(array, sharding)
    return jax.device_put(array, sharding)


def num_shards(sharding: NamedSharding) -> int:
    """Into how many shards a sharding divides an array; axes of one device divide nothing."""
    return math.prod(sharding.mesh.shape[axis] for axis in mesh_axes(sharding.spec))


def mesh_axes(spec: Any) -> list[str]:
    """The axes of a mesh in a `PartitionSpec`, or in one part of it."""
    if spec is None or isinstance(spec, str):
        return [] if spec is None else [spec]
    return [name for part in spec for name in mesh_axes(part)]


def packing_context(weights: Iterable[Any]) -> AbstractContextManager[Any]:
    """The context to pack in: a mesh that leaves open how arrays are sharded, if types say it."""
    typed = next(filter(None, map(_typed_sharding, weights)), None)
    if typed is None:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(_compat.automatic(typed.mesh).abstract_mesh)


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
    sharding = None if isinstance(array, jax.core.Tracer) else getattr(array, "sharding", None)
    typed = isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types
    return sharding if typed else None


def on_mesh(array: Any, sharding: Sharding) -> Any:
    """An array that may lie on one device alone, on all of a mesh."""
    here = not isinstance(array, jax.core.Tracer) and isinstance(array.sharding, NamedSharding)
    return array if here else put(array, sharding.mesh, PartitionSpec())
