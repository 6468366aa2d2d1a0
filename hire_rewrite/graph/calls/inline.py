"""Calls that only group code: `jit`, `checkpoint`, custom derivatives and plain calls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend.core import primitives as p
from jax.sharding import Sharding

from hire_rewrite import _compat
from hire_rewrite.graph.calls.table import InlineCall


def inline_call(eqn: Any) -> InlineCall | None:
    """What knows a call whose body can stand in the caller; None for other equations."""
    if eqn.primitive in _CALLS:
        return _CALLS[eqn.primitive]
    if eqn.params.keys() == {"call_jaxpr"}:
        return _PLAIN
    if not _compat.is_high_call(eqn):
        return None
    return _CHECKPOINT if "policy" in _compat.call_params(eqn) else _DERIVATIVE


class _Plain(InlineCall):
    """A call without any meaning of its own."""

    def body(self, eqn: Any) -> Any:
        return eqn.params["call_jaxpr"]


class _CustomDerivative(InlineCall):
    """`custom_jvp`, `custom_vjp`: its rule describes the old body, so a changed one dissolves it.

    A rewritten body under the old rule would have the derivative of something else.
    """

    derivative = True

    def body(self, eqn: Any) -> Any:
        return _compat.call_jaxpr(eqn)


class _Jit(InlineCall):
    """`jax.jit`: written again with its options and under its name, which a profile shows.

    Inside another `jit` shardings of its operands and results are constraints, and become
    constraints in its body. Layouts and compiler options are those of the outermost `jit`.
    """

    dissolves = False

    def body(self, eqn: Any) -> Any:
        return eqn.params["jaxpr"]

    def on_operands(self, eqn: Any) -> list[Callable[[Any], Any] | None]:
        return list(map(_constraint, eqn.invars, eqn.params["in_shardings"]))

    def on_results(self, eqn: Any) -> list[Callable[[Any], Any] | None]:
        return list(map(_constraint, eqn.outvars, eqn.params["out_shardings"]))

    def wrap(
        self, eqn: Any, fun: Callable[..., Any], operands: Sequence[int]
    ) -> Callable[..., Any]:
        params = eqn.params
        fun.__name__ = params["name"]
        return jax.jit(
            fun,
            inline=params["inline"],
            keep_unused=params["keep_unused"],
            donate_argnums=[i for i, n in enumerate(operands) if params["donated_invars"][n]],
        )


class _Checkpoint(InlineCall):
    """`jax.checkpoint`: keeps its policy, since it decides what a gradient stores."""

    dissolves = False

    def body(self, eqn: Any) -> Any:
        return _compat.call_params(eqn)["jaxpr"]

    def wrap(
        self, eqn: Any, fun: Callable[..., Any], operands: Sequence[int]
    ) -> Callable[..., Any]:
        params = _compat.call_params(eqn)
        barred = params.get("prevent_cse", True)
        if isinstance(barred, tuple):
            barred = tuple(barred[n] for n in operands)
        wrapped = jax.checkpoint(fun, policy=params["policy"], prevent_cse=barred)
        if not params.get("differentiated", False):
            return wrapped

        # In a gradient, it keeps the compiler from finding what was computed before.
        def recomputed(*arrays: Any) -> Any:
            flags = barred if isinstance(barred, tuple) else (barred,) * len(arrays)
            pairs = zip(arrays, flags, strict=True)
            return wrapped(*(lax.optimization_barrier(x) if flag else x for x, flag in pairs))

        return recomputed


def _constraint(var: Any, sharding: Any) -> Callable[[Any], Any] | None:
    """What a sharding of a nested `jit` does to an operand or a result whose type has none."""
    if not isinstance(sharding, Sharding) or _compat.explicit_spec(var.aval) is not None:
        return None
    return functools.partial(lax.with_sharding_constraint, shardings=sharding)


_PLAIN, _DERIVATIVE, _CHECKPOINT = _Plain(), _CustomDerivative(), _Checkpoint()
_CALLS: dict[Any, InlineCall] = {
    p.jit_p: _Jit(),
    p.remat_p: _CHECKPOINT,
    p.custom_jvp_call_p: _DERIVATIVE,
    p.custom_vjp_call_p: _DERIVATIVE,
    p.closed_call_p: _PLAIN,
    p.call_p: _PLAIN,
}
