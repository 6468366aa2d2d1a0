"""Calls whose derivative is a rule: is it that of their arithmetic?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun
from jax.sharding import Mesh, PartitionSpec

from hire_rewrite import _compat
from hire_rewrite.graph.calls.inline import inline_call
from hire_rewrite.graph.evaluate import trial
from hire_rewrite.graph.nodes import Node


def derivative_calls(node: Node) -> list[Any]:
    """The equations of the calls around a node that have a derivative from a rule."""
    calls = ((eqn, inline_call(eqn)) for eqn in node.eqns_around())
    return [eqn for eqn, call in calls if call is not None and call.derivative]


def all_describe_code(eqns: Iterable[Any]) -> bool:
    """Whether the rules of such calls are the derivatives of their arithmetic, as tried on random
    numbers: that of `jax.nn.relu` is (but for the point zero), a straight-through estimator's is
    not. What cannot be tried is not."""
    with trial():
        return all(map(_describes_its_code, eqns))


def _describes_its_code(eqn: Any) -> bool:
    call = inline_call(eqn)
    assert call is not None
    code = jaxpr_as_fun(call.body(eqn))

    def by_rule(*operands: Any) -> Sequence[Any]:
        results = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
        return list(results) if eqn.primitive.multiple_results else [results]

    def gradients() -> list[list[Any]]:
        rng = np.random.default_rng(0)
        operands = [_drawn(var.aval, rng) for var in eqn.invars]
        cotangents = [_drawn(var.aval, rng) for var in eqn.outvars]
        return [_gradients(fn, operands, cotangents) for fn in (by_rule, code)]

    try:
        got, want = _inside(_manual_mesh(eqn), gradients)
    except Exception:  # of whatever kind: its mesh has more devices than there are here, say
        return False
    return all(map(_alike, got, want))


def _manual_mesh(eqn: Any) -> Any:
    """The mesh of the `shard_map` that an equation is in; None if it is in none."""
    meshes = [getattr(getattr(var.aval, "sharding", None), "mesh", None) for var in eqn.invars]
    return next((mesh for mesh in meshes if mesh is not None and mesh.manual_axes), None)


def _inside(mesh: Any, run: Callable[[], Any]) -> Any:
    """What a function of nothing returns inside a `shard_map` over devices of this process, from
    each of them."""
    if mesh is None:
        return run()
    devices = np.array(jax.devices()[: mesh.size]).reshape(mesh.axis_sizes)
    axes = tuple(mesh.manual_axes)
    of_each = jax.shard_map(
        lambda: jax.tree.map(lambda array: array[None], run()), in_specs=(),
        mesh=Mesh(devices, mesh.axis_names), out_specs=PartitionSpec(axes), axis_names={*axes},
    )  # fmt: skip
    return jax.jit(of_each)()


def _gradients(fn: Any, operands: Sequence[Any], cotangents: Sequence[Any]) -> list[Any]:
    """Of what can be differentiated among the operands."""
    places = [i for i, array in enumerate(operands) if jnp.issubdtype(array.dtype, jnp.inexact)]

    def of_some(some: Sequence[Any]) -> list[Any]:
        given = dict(zip(places, some, strict=True))
        results = fn(*(given.get(i, array) for i, array in enumerate(operands)))
        return [array for array in results if jnp.issubdtype(array.dtype, jnp.inexact)]

    _, pull = jax.vjp(of_some, [operands[i] for i in places])
    (found,) = pull([array for array in cotangents if jnp.issubdtype(array.dtype, jnp.inexact)])
    return list(found)


def _alike(one: Any, other: Any) -> bool:
    tolerance = 8 * float(jnp.finfo(one.dtype).eps) ** 0.5
    first, second = (np.asarray(array, np.complex128) for array in (one, other))
    return bool(np.allclose(first, second, rtol=tolerance, atol=tolerance, equal_nan=True))


def _drawn(aval: Any, rng: np.random.Generator) -> Any:
    """Random numbers of a type; integers that are zero or one."""
    inexact = jnp.issubdtype(aval.dtype, jnp.inexact)
    drawn = rng.normal(size=aval.shape) if inexact else rng.integers(0, 2, size=aval.shape)
    return _compat.varying_like(jnp.asarray(drawn, aval.dtype), aval)
