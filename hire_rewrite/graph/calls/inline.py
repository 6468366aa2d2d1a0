"""Calls that only group code: `jit`, `checkpoint`, `custom_jvp`, `custom_vjp` and plain calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


class Jit:
    """`jax.jit`: written again under its name, so that a profile still shows it."""

    def body(self, eqn: Any) -> Any:
        return eqn.params["jaxpr"]

    def wrap(self, eqn: Any, fun: Callable[..., Any]) -> Callable[..., Any] | None:
        fun.__name__ = eqn.params["name"]
        return jax.jit(fun, inline=eqn.params["inline"])


class Checkpoint:
    """`jax.checkpoint`: keeps its policy, since it decides what a gradient stores."""

    def body(self, eqn: Any) -> Any:
        return eqn.params["jaxpr"]

    def wrap(self, eqn: Any, fun: Callable[..., Any]) -> Callable[..., Any] | None:
        return jax.checkpoint(
            fun, policy=eqn.params["policy"], prevent_cse=eqn.params["prevent_cse"]
        )


class CustomDerivative:
    """`custom_jvp` and `custom_vjp`: their rules describe the old body, so it stands in the caller.

    A rewritten body under the old rule would have the derivative of something else.
    """

    def body(self, eqn: Any) -> Any:
        return eqn.params["call_jaxpr"]

    def wrap(self, eqn: Any, fun: Callable[..., Any]) -> Callable[..., Any] | None:
        return None


class Plain:
    """A call without any meaning of its own."""

    def body(self, eqn: Any) -> Any:
        return eqn.params["call_jaxpr"]

    def wrap(self, eqn: Any, fun: Callable[..., Any]) -> Callable[..., Any] | None:
        return None
