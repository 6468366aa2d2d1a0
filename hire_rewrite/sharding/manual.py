"""Sites inside a `shard_map` of the function's own, where a weight is one device's shard.

Each device packs its own shards, in a `shard_map` like the function's, and the packed arrays have
the devices on their leading axis: `[devices · layers, ...]`, each device its own layers. To the
rewritten function they are operands of the `shard_map` more.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from hire_rewrite import _compat
from hire_rewrite.errors import HireRewriteError
from hire_rewrite.graph.nodes import Scope, Value, mesh_axes
from hire_rewrite.graph.provenance import body_of
from hire_rewrite.passes.trace import Trace
from hire_rewrite.patterns.linear import Linear
from hire_rewrite.sharding.placement import shardings_of
from hire_rewrite.sites.ffn.match import FFNMatch
from hire_rewrite.sites.head.match import HeadMatch
from hire_rewrite.sites.weights import Stacked, Stacker

__all__ = ["Shards", "on_each_device", "pieces_of", "shards_of"]


@dataclasses.dataclass(frozen=True, eq=False)
class Shards:
    """A `shard_map` around a site.

    Attributes:
      scope: its body.
      mesh: as the function gives it.
      manual: the axes of the mesh that the body knows, in the mesh's order.
      axes: those along which the site's weights differ.
      split: those along which its inputs do: other devices have other tokens, or other parts of
        the contracted axis.
      weights: the inputs of the body that the site's weights are computed from.
      outside: how many scans around it the site's weights differ in.
    """

    scope: Scope
    mesh: Mesh | AbstractMesh
    manual: tuple[str, ...]
    axes: tuple[str, ...]
    split: frozenset[str]
    weights: tuple[Value, ...]
    outside: int

    def __str__(self) -> str:
        return " × ".join(f"{axis}={self.mesh.shape[axis]}" for axis in self.axes)

    @property
    def count(self) -> int:
        """How many different shards there are."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes)

    @property
    def pieces(self) -> int:
        """Into how many the rows of a vocabulary are divided."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes if axis not in self.split)

    @property
    def spec(self) -> PartitionSpec:
        """Of arrays with the devices on their leading axis."""
        return PartitionSpec(self.axes) if self.axes else PartitionSpec()

    def together(self, report: Any) -> Any:
        """What all devices report, `[devices, ...]`, as `[count, ...]` for the different shards,
        or `[...]` if there is one.

        What devices report of one shard is added up where they have different tokens, and the
        same everywhere else.
        """
        sizes = [self.mesh.shape[axis] for axis in self.manual]

        def one(leaf: Any) -> Any:
            leaf = leaf.reshape(*sizes, *leaf.shape[1:])
            for place, axis in reversed(list(enumerate(self.manual))):
                if axis not in self.axes:
                    leaf = leaf.sum(place) if axis in self.split else leaf.take(0, place)
            first = (self.count,) if self.axes else ()
            return leaf.reshape(*first, *leaf.shape[len(self.axes) :])

        return jax.tree.map(one, report)


def shards_of(trace: Trace, match: FFNMatch | HeadMatch) -> tuple[Shards | None, str | None]:
    """The `shard_map` around a site, if there is one, and why the site has to stay dense in it."""
    scopes = [scope for scope in match.linears[0].node.scope.ancestors() if _is_manual(scope)]
    if not scopes:
        return None, None
    scope, provenance = scopes[0], trace.provenance
    assert scope.parent is not None
    params = scope.parent.params
    names = set(map(str, params["newly_manual_axes"]))
    manual = tuple(str(axis) for axis in params["mesh"].axis_names if axis in names)
    differs = frozenset[str]().union(*(trace.differences[weight] for weight in match.weights))
    roots = (root for weight in match.weights for root in provenance.roots(weight, scope))
    varying = {s for weight in match.weights for s in provenance.varies_over(weight)}
    around = set(scope.parent.scope.ancestors())
    shards = Shards(
        scope,
        params["mesh"],
        manual,
        tuple(axis for axis in manual if axis in differs),
        trace.differences[match.linears[0].x] & names,
        tuple(root for root in dict.fromkeys(roots) if root.is_input),
        len(varying & around),
    )
    return shards, _obstacle(trace, match, shards, nested=len(scopes) > 1)


def pieces_of(trace: Trace, linear: Linear) -> int:
    """Into how many the outputs of a linear layer are divided in the `shard_map`s around it."""
    axes = trace.differences[linear.weight] - trace.differences[linear.x]
    count = 1
    for scope in linear.node.scope.ancestors():
        if _is_manual(scope) and scope.parent is not None:
            mesh, names = scope.parent.params["mesh"], scope.parent.params["newly_manual_axes"]
            count *= math.prod(mesh.shape[name] for name in names if str(name) in axes)
    return count


def on_each_device(
    shards: Shards, stacker: Stacker, pack: Callable[[Stacker, Any], Any], more: Any
) -> Any:
    """What `pack` makes of each device's own weights.

    Args:
      stacker: of the function's weights.
      pack: a device's stacker and its part of `more` to arrays with a leading axis of layers.
      more: a pytree of arrays with the devices on their leading axis.
    """
    parent = shards.scope.parent
    assert parent is not None
    (body,) = parent.bodies
    links = [body.inputs[shards.scope.inputs.index(value)] for value in shards.weights]
    outer = [stacker(link.outer) for link in links]
    specs = [
        PartitionSpec(*(None,) * len(stacked.over), *link.spec)
        for stacked, link in zip(outer, links, strict=True)
    ]
    arrays = [stacked.array for stacked in outer]
    mesh = _concrete(shards, arrays)

    def own(arrays: list[Any], more: Any) -> Any:
        parts = zip(shards.weights, arrays, outer, strict=True)
        inputs = {value: Stacked(part, whole.over) for value, part, whole in parts}
        return pack(Stacker(inputs), more)

    if isinstance(mesh, Mesh):
        arrays = [_put(array, mesh, spec) for array, spec in zip(arrays, specs, strict=True)]
        more = jax.tree.map(lambda array: _put(array, mesh, shards.spec), more)
    mapped = jax.shard_map(
        own,
        mesh=_compat.mesh_around(mesh),
        in_specs=(specs, shards.spec),
        out_specs=shards.spec,
        axis_names=set(shards.manual),
        check_vma=False,
    )
    return jax.jit(mapped)(arrays, more)


def _is_manual(scope: Scope) -> bool:
    return scope.parent is not None and scope.parent.primitive is _compat.shard_map_p


def _obstacle(
    trace: Trace, match: FFNMatch | HeadMatch, shards: Shards, *, nested: bool
) -> str | None:
    """Why a site in a `shard_map` has to stay dense, if it has to."""
    over = ", ".join(shards.manual)
    if nested:
        return f"inside shard_map over {over}, inside another shard_map"
    for value in match.weights:
        if _is_gathered(value, shards.scope):
            return f"inside shard_map over {over}, where its weights are sent between devices"
    if any(_compat.explicit_spec(value.aval) is not None for value in match.outputs):
        return f"inside shard_map over {over}, and types say how arrays lie along other axes"
    shardings = shardings_of(trace, match.weights)
    used = {name for sharding in shardings for name in mesh_axes(sharding.spec)}
    others = sorted(used - set(shards.manual))
    if others:
        return f"inside shard_map over {over}, and its weights are spread over {', '.join(others)}"
    return None


def _is_gathered(value: Value, within: Scope) -> bool:
    """Whether devices exchange a weight before it is used."""
    stack, seen = [value], {value}
    while stack:
        current = stack.pop()
        sources: list[Value] = []
        if current.node is not None:
            inside = (n for body in current.node.bodies for s in body.scope.walk() for n in s.nodes)
            if any(node.primitive in _compat.exchanges for node in (current.node, *inside)):
                return True
            sources += current.node.ins
        elif current.is_input and current.scope is not within:
            body, i = body_of(current)
            sources.append(body.inputs[i].outer)
        stack += [source for source in sources if source not in seen]
        seen.update(sources)
    return False


def _concrete(shards: Shards, arrays: list[Any]) -> Mesh | AbstractMesh:
    """The devices of a mesh that the function knows by its axes alone.

    Raises:
      HireRewriteError: nothing says which they are.
    """
    if isinstance(shards.mesh, Mesh) or any(isinstance(a, jax.core.Tracer) for a in arrays):
        return shards.mesh
    lies = [getattr(array, "sharding", None) for array in arrays]
    known = [sharding.mesh for sharding in lies if isinstance(sharding, NamedSharding)]
    for mesh in (*known, jax.sharding.get_mesh()):
        if mesh.axis_names and dict(mesh.shape) == dict(shards.mesh.shape):
            return mesh
    raise HireRewriteError(
        f"pack: a shard_map takes its mesh of axes {dict(shards.mesh.shape)} from the context: "
        "pack under jax.set_mesh(mesh), or lay the weights out on the mesh"
    )


def _put(array: Any, mesh: Mesh, spec: PartitionSpec) -> Any:
    if isinstance(array, jax.core.Tracer):
        return array
    return jax.device_put(jnp.asarray(array), NamedSharding(mesh, spec))
