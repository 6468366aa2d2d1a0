"""Sites inside a `shard_map` of the function's own (a manual region): each device has a shard.

Each device packs its own shards, in a `shard_map` like the function's. The packed arrays,
`[devices · layers, ...]`, become extra `shard_map` operands.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from hire_rewrite import _compat
from hire_rewrite.errors import HireRewriteError
from hire_rewrite.graph.nodes import Scope, Value
from hire_rewrite.graph.reports import combine
from hire_rewrite.graph.sources import backward_slice
from hire_rewrite.graph.trace import Trace
from hire_rewrite.graph.weights import Stacked, Stacker
from hire_rewrite.patterns.linear import Linear
from hire_rewrite.sharding.rows import Sharding, put


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ManualSharding(Sharding):
    """A site in a manual region: each device computes on its own shards alone.

    Attributes:
      scope: the body of the `shard_map`.
      mesh: as the function gives it.
      manual: the axes of the mesh that the body knows, in the mesh's order.
      axes: those along which the site's weights vary.
      token_axes: those along which its inputs vary: other devices have other tokens, or other
        shards of the contracted axis.
      weights: the inputs of the body that the site's weights are computed from.
      outer_loops: in how many scans around the region the site's weights vary.
    """

    scope: Scope
    mesh: Mesh | AbstractMesh
    manual: tuple[str, ...]
    axes: tuple[str, ...]
    token_axes: frozenset[str]
    weights: tuple[Value, ...]
    outer_loops: int

    @property
    def region(self) -> ManualSharding:
        return self

    @property
    def count(self) -> int:
        """How many different shards there are."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes)

    @property
    def vocabulary_shards(self) -> int:
        axes = (axis for axis in self.axes if axis not in self.token_axes)
        return math.prod(self.mesh.shape[axis] for axis in axes)

    @property
    def spec(self) -> PartitionSpec:
        """Of arrays with the devices on their leading axis."""
        return PartitionSpec(self.axes) if self.axes else PartitionSpec()

    def describe(self) -> str:
        return f", for each device of {self} by itself" if self.axes else ""

    def shardings(self, arrays: Any, specs: Callable[[Any], Any]) -> Any:
        return jax.tree.map(lambda _: NamedSharding(self.mesh, self.spec), arrays)

    def combine(self, report: Any) -> Any:
        """What all devices report, `[devices, ...]`, as `[count, ...]` for the different shards,
        or `[...]` if there is one.

        Reports of the same shard are combined where its devices have different tokens, and are
        the same everywhere else.
        """
        sizes = [self.mesh.shape[axis] for axis in self.manual]
        first = (self.count,) if self.axes else ()
        report = jax.tree.map(lambda leaf: leaf.reshape(*sizes, *leaf.shape[1:]), report)
        for place, axis in reversed(list(enumerate(self.manual))):
            if axis not in self.axes:
                shards = sizes[place] if axis in self.token_axes else 1
                take = functools.partial(jnp.take, axis=place)
                reports = [
                    jax.tree.map(functools.partial(take, indices=i), report) for i in range(shards)
                ]
                report = functools.reduce(combine, reports)
        return jax.tree.map(
            lambda leaf: leaf.reshape(*first, *leaf.shape[len(self.axes) :]), report
        )

    def pack(self, pack: Callable[[Any, Any], Any], weights: Any, calibration: Any) -> Any:
        """What `pack` makes of each device's own weights and its part of the calibration, which
        has the devices on its leading axis."""
        parent = self.scope.parent
        assert parent is not None
        (body,) = parent.bodies
        links = [body.inputs[self.scope.inputs.index(value)] for value in self.weights]
        outer = [weights(link.outer) for link in links]
        specs = [
            PartitionSpec(*(None,) * len(stacked.over), *link.spec)
            for stacked, link in zip(outer, links, strict=True)
        ]
        arrays = [stacked.array for stacked in outer]
        mesh = self._concrete_mesh(arrays)

        def pack_shard(shards: list[Any], calibration: Any) -> Any:
            stacked = zip(self.weights, shards, outer, strict=True)
            inputs = {value: Stacked(shard, whole.over) for value, shard, whole in stacked}
            return pack(Stacker(inputs), calibration)

        if isinstance(mesh, Mesh):

            def lay_out(array: Any, spec: PartitionSpec) -> Any:
                traced = isinstance(array, jax.core.Tracer)
                return array if traced else put(jnp.asarray(array), mesh, spec)

            arrays = list(map(lay_out, arrays, specs))
            calibration = jax.tree.map(lambda leaf: lay_out(leaf, self.spec), calibration)
        mapped = jax.shard_map(
            pack_shard,
            mesh=_compat.mesh_around(mesh),
            in_specs=(specs, self.spec),
            out_specs=self.spec,
            axis_names=set(self.manual),
            check_vma=False,
        )
        return jax.block_until_ready(jax.jit(mapped)(arrays, calibration))

    def _concrete_mesh(self, arrays: list[Any]) -> Mesh | AbstractMesh:
        """The devices of a mesh that the function knows by its axes alone.

        Raises:
          HireRewriteError: nothing says which they are.
        """
        if isinstance(self.mesh, Mesh) or any(isinstance(a, jax.core.Tracer) for a in arrays):
            return self.mesh
        shardings = [getattr(array, "sharding", None) for array in arrays]
        known = [item.mesh for item in shardings if isinstance(item, NamedSharding)]
        for mesh in (*known, jax.sharding.get_mesh()):
            if mesh.axis_names and dict(mesh.shape) == dict(self.mesh.shape):
                return mesh
        raise HireRewriteError(
            f"pack: a shard_map takes its mesh of axes {dict(self.mesh.shape)} from the context: "
            "pack under jax.set_mesh(mesh), or lay the weights out on the mesh"
        )


def manual_sharding(
    trace: Trace, x: Value, weights: Iterable[Value]
) -> tuple[ManualSharding | None, bool]:
    """The manual region around a site with these weights, if there is one, and whether that is
    nested in another one.

    Args:
      x: the site's input.
    """
    scopes = [scope for scope in x.scope.ancestors() if _is_manual(scope)]
    if not scopes:
        return None, False
    scope, provenance, weights = scopes[0], trace.provenance, tuple(weights)
    assert scope.parent is not None
    params = scope.parent.params
    names = set(map(str, params["newly_manual_axes"]))
    manual = tuple(str(axis) for axis in params["mesh"].axis_names if str(axis) in names)
    varying = frozenset[str]().union(*(trace.differences[weight] for weight in weights))
    roots = (root for weight in weights for root in provenance.roots(weight, scope))
    loops = {loop for weight in weights for loop in provenance.varies_over(weight)}
    region = ManualSharding(
        scope=scope,
        mesh=params["mesh"],
        manual=manual,
        axes=tuple(axis for axis in manual if axis in varying),
        token_axes=trace.differences[x] & names,
        weights=tuple(root for root in dict.fromkeys(roots) if root.is_input),
        outer_loops=len(loops & set(scope.parent.scope.ancestors())),
    )
    return region, len(scopes) > 1


def vocabulary_shards(trace: Trace, linear: Linear) -> int:
    """Into how many shards the manual regions around a linear layer divide its outputs."""
    axes = trace.differences[linear.weight] - trace.differences[linear.x]
    count = 1
    for scope in linear.node.scope.ancestors():
        if _is_manual(scope) and scope.parent is not None:
            mesh, names = scope.parent.params["mesh"], scope.parent.params["newly_manual_axes"]
            count *= math.prod(mesh.shape[name] for name in names if str(name) in axes)
    return count


def exchanges_weights(value: Value, within: Scope) -> bool:
    """Whether devices exchange a weight of a manual region before it is used."""
    nodes = (source.node for source in backward_slice(value, within) if source.node is not None)
    return any(inner.primitive in _compat.exchanges for node in nodes for inner in node.walk())


def _is_manual(scope: Scope) -> bool:
    return scope.parent is not None and scope.parent.primitive is _compat.shard_map_p
