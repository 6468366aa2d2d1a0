"""Calls in the jaxprs that proofs read."""

from __future__ import annotations

from typing import Any

from hire_rewrite import _compat

__all__ = ["body_of"]


def body_of(eqn: Any) -> Any:
    """The jaxpr of a call that passes its operands on as they are."""
    bodies = [param for param in eqn.params.values() if _compat.is_jaxpr(param)]
    if len(bodies) != 1:
        return None
    body = _compat.open_jaxpr(bodies[0])[0]
    calls = ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call")
    fits = len(body.invars) == len(eqn.invars) and len(body.outvars) == len(eqn.outvars)
    named = eqn.primitive.name in (*calls, "custom_vjp_call", "custom_vjp_call_jaxpr")
    return body if fits and named else None
