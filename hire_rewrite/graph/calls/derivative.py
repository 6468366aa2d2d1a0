"""Calls whose derivative is a rule: is it that of their arithmetic?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun

from hire_rewrite.graph.calls.inline import inline_call
from hire_rewrite.graph.nodes import Node

_NO_MESH = jax.sharding.AbstractMesh((), ())


def derivative_calls(node: Node) -> list[Any]:
    """The equations of the calls around a node that have a derivative from a rule."""
    calls = ((eqn, inline_call(eqn)) for eqn in node.eqns_around())
    return [eqn for eqn, call in calls if call is not None and call.derivative]


def all_describe_their_code(eqns: Iterable[Any]) -> bool:
    """Whether the rules of such calls are the derivatives of their arithmetic, as tried on random
    numbers: that of `jax.nn.relu` is (but for the point zero), a straight-through estimator's is
    not. What cannot be tried is not."""
    with jax.core.eval_context(), jax.sharding.use_abstract_mesh(_NO_MESH):
        return all(map(_describes_its_code, eqns))


def _describes_its_code(eqn: Any) -> bool:
    call, rng = inline_call(eqn), np.random.default_rng(0)
    assert call is not None
    code = jaxpr_as_fun(call.body(eqn))

    def by_rule(*operands: Any) -> Sequence[Any]:
        results = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
        return list(results) if eqn.primitive.multiple_results else [results]

    try:
        operands = [_drawn(var.aval, rng) for var in eqn.invars]
        cotangents = [_drawn(var.aval, rng) for var in eqn.outvars]
        got, want = (_gradients(fn, operands, cotangents) for fn in (by_rule, code))
    except Exception:  # of whatever kind: a mesh's axis that is not known here, say
        return False
    return all(map(_alike, got, want))


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
    if jnp.issubdtype(aval.dtype, jnp.inexact):
        return jnp.asarray(rng.normal(size=aval.shape), aval.dtype)
    return jnp.asarray(rng.integers(0, 2, size=aval.shape), aval.dtype)
