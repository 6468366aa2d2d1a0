"""Calls in the jaxprs that proofs read."""

from __future__ import annotations

from typing import Any

from hire_rewrite import _compat

__all__ = ["body_of"]

_CALLS = (
    *("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint"),
    *("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"),
)


def body_of(eqn: Any) -> Any:
    """The jaxpr of a call that passes its operands on as they are."""
    if _compat.is_high_call(eqn):
        bodies = [_compat.call_jaxpr(eqn)]
    elif eqn.primitive.name in _CALLS:
        bodies = [param for param in eqn.params.values() if _compat.is_jaxpr(param)]
    else:
        return None
    if len(bodies) != 1 or bodies[0] is None:
        return None
    body = _compat.open_jaxpr(bodies[0])[0]
    fits = len(body.invars) == len(eqn.invars) and len(body.outvars) == len(eqn.outvars)
    return body if fits else None
