"""The one file that knows jax versions.

All that the package reads from a jaxpr and that differed between jax 0.10 and 0.12 is asked here,
by looking at what is there rather than at a version number where that says it.
"""

import functools
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import io_callback
from jax.extend import core as jex_core
from jax.extend.core import primitives as p
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from hire_rewrite.errors import HireRewriteError


def open_jaxpr(closed: Any) -> tuple[Any, Sequence[Any]]:
    """The open jaxpr of a closed one and the constants for its `constvars`: up to jax 0.10 a
    `ClosedJaxpr` wraps a `Jaxpr`; from 0.11 both are one class."""
    jaxpr = closed.jaxpr if hasattr(closed, "jaxpr") else closed
    consts = closed.consts if hasattr(closed, "consts") else ()
    return jaxpr, consts


def default_matmul_precision() -> Any:
    """What `jax.default_matmul_precision` says here, or None."""
    return jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]


def is_jaxpr(obj: Any) -> bool:
    """Whether `obj` is a jaxpr, open or closed."""
    return isinstance(obj, jex_core.Jaxpr | jex_core.ClosedJaxpr)


def scan_split(params: dict[str, Any]) -> tuple[int, int]:
    """How many operands of a `scan` are constants and how many are carried: jax 0.10 counts them,
    later versions store the flat trees of constants, carry and sliced inputs."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def _equations(fun: Callable[..., Any]) -> Sequence[Any]:
    return open_jaxpr(jax.make_jaxpr(fun)(jax.ShapeDtypeStruct((2,), np.float32)))[0].eqns


def _primitive_of(fun: Callable[..., Any], place: int = 0) -> Any:
    """The primitive behind a public function, for those that `jax.extend` does not name."""
    return _equations(fun)[place].primitive


split_p = _primitive_of(lambda x: lax.split(x, (1, 1)))
unstack_p = _primitive_of(jnp.unstack)
stack_p = _primitive_of(lambda x: jnp.stack([x, x]), -1)
optimization_barrier_p = _primitive_of(lax.optimization_barrier)
ragged_dot_general_p = _primitive_of(
    lambda x: lax.ragged_dot(jnp.ones((2, 2)), jnp.ones((1, 2, 2)), jnp.ones(1, jnp.int32) * 2), -1
)


def _mesh(kind: AxisType) -> AbstractMesh:
    return AbstractMesh((1,), ("x",), axis_types=(kind,))


with jax.sharding.use_abstract_mesh(_mesh(AxisType.Explicit)):
    reshard_p = _primitive_of(lambda x: jax.sharding.reshard(x, PartitionSpec("x")))


def _manual(fun: Callable[..., Any]) -> Any:
    """The `shard_map` equation around a function of one shard."""
    spec = PartitionSpec("x")
    mapped = jax.shard_map(fun, mesh=_mesh(AxisType.Auto), in_specs=spec, out_specs=spec)
    return _equations(mapped)[0]


def _manual_equations(fun: Callable[..., Any]) -> Sequence[Any]:
    return open_jaxpr(_manual(fun).params["jaxpr"])[0].eqns


def _inside(fun: Callable[..., Any]) -> set[Any]:
    return {eqn.primitive for eqn in _manual_equations(fun)}


def _effect_types(equations: Iterable[Any]) -> tuple[type, ...]:
    return tuple(dict.fromkeys(type(effect) for eqn in equations for effect in eqn.effects))


_NAMES_AN_AXIS = _effect_types(_manual_equations(lambda x: x + lax.axis_index("x")))
_UNORDERED = _NAMES_AN_AXIS + _effect_types(
    _equations(lambda x: (jax.debug.callback(print, x), io_callback(id, None, x), x)[-1])
)
_MAKE_REF, _READ_REF = _equations(lambda x: jax.new_ref(x)[...])[:2]
_MAKES_REF, _READS_REF = _effect_types([_MAKE_REF, _READ_REF])
_Ref = type(_MAKE_REF.outvars[0].aval)


def has_effects(eqn: Any) -> bool:
    """Whether an equation does anything but compute. (Inside `shard_map`, to name an axis of the
    mesh counts as an effect in jax.)"""
    return any(not isinstance(effect, _NAMES_AN_AXIS) for effect in eqn.effects)


def is_ref(aval: Any) -> bool:
    """Whether a type is that of a mutable array (`jax.Ref`)."""
    return isinstance(aval, _Ref)


def ordered_effects(eqn: Any) -> dict[int | None, bool]:
    """What an equation does that has its place among the effects of others.

    Returns:
      By the number of the operand that is a `Ref`, or None for the world outside, whether the
      equation writes to it.
    """
    writes: dict[int | None, bool] = {}
    refs = [i for i, var in enumerate(eqn.invars) if is_ref(var.aval)]
    for effect in eqn.effects:
        if isinstance(effect, _UNORDERED):
            continue
        places: Sequence[int | None] = refs if isinstance(effect, _MAKES_REF) else [None]
        if hasattr(effect, "input"):
            places = [eqn.invars.index(effect.input)]
        for place in places:
            writes[place] = writes.get(place, False) or not isinstance(effect, _READS_REF)
    return writes


def annotations(eqn: Any) -> tuple[str | None, tuple[tuple[str, Any], ...]]:
    """What an equation tells the compiler: its compute type (`compute_on`) and XLA metadata."""
    return eqn.ctx.compute_type, tuple(sorted((eqn.ctx.xla_metadata or {}).items()))


def is_high_call(eqn: Any) -> bool:
    """Whether an equation is a call of jax's "high" kind, which `JAX_REMAT3` and the like make of
    `checkpoint` and custom derivatives."""
    return eqn.primitive.name == "call_hi_primitive"


def call_params(eqn: Any) -> dict[str, Any]:
    """The parameters of a call; one of the high kind keeps them in an object."""
    return eqn.params["_prim"].params if is_high_call(eqn) else eqn.params


def call_jaxpr(eqn: Any) -> Any | None:
    """The jaxpr of a call with a derivative of its own; None if jax does not tell."""
    params = call_params(eqn)
    jaxpr = params["traced"].jaxpr if "traced" in params else params.get("call_jaxpr")
    if jaxpr is not None and len(open_jaxpr(jaxpr)[0].invars) == len(eqn.invars):
        return jaxpr
    if not all(isinstance(var.aval, jax.core.ShapedArray) for var in (*eqn.invars, *eqn.outvars)):
        return None
    expand = functools.partial(eqn.primitive.to_lojax, **eqn.params)
    try:
        with eqn.ctx.manager:
            return jax.make_jaxpr(expand)(*(var.aval for var in eqn.invars))
    except (NameError, NotImplementedError):  # it uses a mesh axis that only its caller knows
        return None


shard_map_p = _manual(lambda x: x * 2).primitive
sharding_casts = frozenset(
    {reshard_p, *_inside(lambda x: x * 2.0)} - {p.mul_p, p.convert_element_type_p}
)
"""What changes the sharding in an array's type, and nothing else."""

varying_casts = sharding_casts - {reshard_p}
"""Of these what says, inside `shard_map`, that an array differs from device to device."""


def is_sharded_by_type(aval: Any) -> bool:
    """Whether an array's type says over which axes of a mesh it is sharded."""
    sharding = getattr(aval, "sharding", None)
    return sharding is not None and any(axis is not None for axis in sharding.spec)


def explicit_spec(aval: Any) -> PartitionSpec | None:
    """The sharding in an array's type, if its mesh has explicit axes."""
    sharding = getattr(aval, "sharding", None)
    if sharding is None or AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    return sharding.spec


def replicated(x: jax.Array) -> jax.Array:
    """An array that is sharded nowhere, if its type says how it is sharded."""
    if explicit_spec(jax.typeof(x)) is None:
        return x
    whole: jax.Array = jax.sharding.reshard(x, PartitionSpec())
    return whole


def automatic(mesh: Mesh | AbstractMesh) -> Any:
    """The same mesh with all axes left to the compiler."""
    kinds = (AxisType.Auto,) * len(mesh.axis_names)
    if isinstance(mesh, AbstractMesh):
        return AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=kinds)
    return Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)


def mesh_around(mesh: Mesh | AbstractMesh) -> Mesh | AbstractMesh | None:
    """What `shard_map` wants for a mesh: None where the mesh is known from the context.

    Raises:
      HireRewriteError: the context has another mesh.
    """
    around = jax.sharding.get_abstract_mesh()
    if around.empty:
        return mesh
    if dict(around.shape) != dict(mesh.shape):
        raise HireRewriteError(
            f"the weights lie on a mesh of axes {dict(mesh.shape)}, but the mesh in use here has "
            f"{dict(around.shape)}: call under the mesh that was packed for"
        )
    return None


def invariant_over(aval: Any, axes: Sequence[str]) -> Any:
    """The type of an array inside `shard_map`, if it is the same all along the mesh's `axes`."""
    return aval.update_manual_axis_type(
        aval.manual_axis_type.update(varying=aval.manual_axis_type.varying - set(axes))
    )


def at_most(size: Any, most: int) -> bool:
    """Whether a size is known to be at most so much. A symbol of `jax.export` is where its
    constraints say so."""
    try:
        return bool(size <= most)
    except jax.errors.InconclusiveDimensionOperation:
        return False


def is_exported(context: Any) -> bool:
    """Whether what is lowered (in the context of a lowering rule) is to be serialized."""
    return bool(context.module_context.lowering_parameters.for_export)


def platforms(context: Any) -> tuple[str, ...]:
    """The platforms for which something is lowered (in the context of a lowering rule)."""
    return tuple(context.platforms or context.module_context.platforms)


def is_divided(context: Any) -> bool:
    """Whether the compiler is to divide what is lowered among devices (inside a `shard_map` over
    all axes the program has done so itself)."""
    axes = context.module_context.axis_context
    if hasattr(axes, "num_devices"):
        return bool(axes.num_devices != 1)
    mine = set(axes.manual_axes) | set(axes.mesh.manual_axes)
    return mine != set(axes.mesh.axis_names)


def manual_axes() -> tuple[str, ...]:
    """The axes of the mesh that a `shard_map` around makes known."""
    return tuple(map(str, jax.sharding.get_abstract_mesh().manual_axes))


def varying_type(aval: Any) -> dict[str, Any]:
    """What a `jax.ShapeDtypeStruct` is given to differ from device to device as a type does."""
    kind = getattr(aval, "manual_axis_type", None)
    if kind is None or not kind.varying:
        return {}
    return {"manual_axis_type": kind, "sharding": aval.sharding}  # whose mesh has the axes


def varying_shapes(specs: Sequence[Any], arrays: Sequence[Any]) -> Sequence[Any]:
    """The types of arrays inside `shard_map`, if they differ along the axes of the mesh along which
    any of some other arrays does."""
    axes = frozenset(varying_axes(arrays))
    if not axes:
        return specs
    kind: Any = {
        "manual_axis_type": jax.typeof(arrays[0]).manual_axis_type.update(varying=axes),
        "sharding": NamedSharding(jax.sharding.get_abstract_mesh(), PartitionSpec()),
    }
    return [
        jax.ShapeDtypeStruct(spec.shape, spec.dtype, weak_type=spec.weak_type, **kind)
        for spec in specs
    ]


def invariant_shape(spec: Any) -> Any:
    """The type of an array that is the same on all devices of a `shard_map`."""
    if not varying_type(spec):
        return spec
    return jax.ShapeDtypeStruct(spec.shape, spec.dtype, weak_type=spec.weak_type)


def varying_over(x: jax.Array, axes: Sequence[str]) -> jax.Array:
    """x inside `shard_map`, typed as if it differed along the mesh's `axes` (those of a `vmap`
    have no such type)."""
    same = set(manual_axes()) - set(jax.typeof(x).manual_axis_type.varying)
    more = tuple(axis for axis in axes if axis in same)
    return lax.pcast(x, more, to="varying") if more else x


def varying(x: jax.Array) -> jax.Array:
    """x, typed inside `shard_map` as if it differed from device to device."""
    return varying_over(x, manual_axes())


def varying_like(x: jax.Array, aval: Any) -> jax.Array:
    """x, typed inside `shard_map` as if it differed along the axes that another type does."""
    return varying_over(x, sorted(map(str, aval.manual_axis_type.varying)))


def varying_alike(operands: Sequence[Any]) -> Sequence[Any]:
    """Operands of a primitive inside `shard_map`, typed as if each differed where any does."""
    axes = varying_axes(operands)
    return [varying_over(x, axes) for x in operands]


def varying_axes(operands: Sequence[Any]) -> list[str]:
    """The axes of the mesh of a `shard_map` along which any of these differs, by their types."""
    if not manual_axes():
        return []
    types = (jax.typeof(x).manual_axis_type.varying for x in operands)
    return sorted(map(str, frozenset().union(*types)))


reductions = (
    _inside(lambda x: lax.psum(x, "x") + lax.pmax(x, "x") + lax.pmin(x, "x"))
    | {p.psum_p, p.pmax_p, p.pmin_p}
) - {p.add_p, *sharding_casts}
"""What puts together, number by number, the arrays of several devices."""

exchanges = (
    reductions
    | {p.all_gather_p, p.all_to_all_p, p.ppermute_p, p.ragged_all_to_all_p}
    | _inside(lambda x: lax.psum_scatter(x, "x", tiled=True))
) - sharding_casts
"""What brings numbers of other devices."""

cpu_fuses_widening = jax.__version_info__ < (0, 12)
"""Whether XLA's CPU backend emits vector code for a vector-matrix product that is fused with the
widening of the matrix. From jaxlib 0.12 on it adds up one number at a time, in order: 9 times
slower, so that other forms are better there."""


def rounds_casts() -> bool:
    """Whether XLA is told to round wherever a program does: it leaves out a cast to fewer bits and
    back otherwise."""
    return bool(re.search(r"xla_allow_excess_precision=(false|0)", os.environ.get("XLA_FLAGS", "")))
