"""Operations that some platforms compute by a kernel of their own.

A `KernelOperation` is a function of arrays that is written in JAX, its reference;
`register_kernel` names a function that computes the same on one platform. The reference is what is
differentiated, and what is exported (`jax.export`): the process that runs the program need not have
the kernels.
With `HIRE_REWRITE_KERNELS=0` in the environment no kernel is used.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp

from hire_rewrite import _compat
from hire_rewrite.ops.kernels.call import Call, Kernel, call_p

__all__ = ["KernelOperation", "Registration", "register_kernel"]


class KernelOperation:
    """A function of arrays that platforms may compute by kernels.

    It is called with arrays (or None) by position, and with settings, which are hashable, by name.
    It returns an array, or a tuple of several.

    Examples:
      >>> @KernelOperation
      ... def scaled(x, *, power):
      ...     return x * 2.0**power
      >>> scaled(jnp.float32(3.0), power=2).item()
      12.0
    """

    def __init__(self, reference: Callable[..., Any]) -> None:
        functools.update_wrapper(self, reference)
        self.reference = reference

    def __call__(self, *operands: Any, **settings: Any) -> Any:
        kernels = self._supporting(operands, settings)
        if not kernels:
            return self.reference(*operands, **settings)
        leaves, tree = jax.tree.flatten(operands)
        named, precision = tuple(sorted(settings.items())), _compat.default_matmul_precision()
        call = Call(self.reference, kernels, tree, named, precision)
        results = call_p.bind(*map(jnp.asarray, leaves), call=call)
        return results[0] if len(results) == 1 else tuple(results)

    def _supporting(self, operands: Any, settings: Any) -> tuple[Kernel, ...]:
        """The first kernel of each platform that takes these operands."""
        if os.environ.get("HIRE_REWRITE_KERNELS") == "0":
            return ()
        chosen: dict[str, Kernel] = {}
        for registered in _registered():
            kernel = registered.kernel
            wanted = registered.operation is self and kernel.platform not in chosen
            if wanted and kernel.supports(*operands, **settings):
                chosen[kernel.platform] = kernel
        return tuple(chosen.values())


def register_kernel(
    operation: KernelOperation,
    platform: str,
    function: Callable[..., Any],
    *,
    supports: Callable[..., bool] = lambda *_, **__: True,
    divisible: bool = True,
) -> Registration:
    """Have a function compute an operation on a platform, before what is registered there already.

    Functions that were compiled without it are compiled anew.

    Args:
      platform: as JAX calls it: "cpu", "tpu", "cuda", "rocm", ...; "gpu" for both of these.
      function: takes what the operation takes, and returns arrays of the same shapes and dtypes.
      supports: given the same, says by shapes and dtypes whether the function can compute it.
      divisible: whether the compiler can divide the function among devices; where it would have to
        and cannot, the reference runs.

    Examples:
      >>> from hire_rewrite.ops.narrow import matmul
      >>> def by_hand(x, rows, layer, scale=None, offset=None):
      ...     return jnp.dot(x, rows[layer].T)
      >>> with register_kernel(matmul, "cpu", by_hand):
      ...     matmul(jnp.ones((1, 3)), jnp.ones((1, 2, 3)), 0).tolist()
      [[3.0, 3.0]]
    """
    registration = Registration(operation, Kernel(platform, function, supports, divisible))
    _set((registration, *_registered()))
    return registration


@dataclasses.dataclass(frozen=True, eq=False)
class Registration:
    """A kernel of an operation, until `unregister()` or until the end of a `with` statement."""

    operation: KernelOperation
    kernel: Kernel

    def unregister(self) -> None:
        """Take the kernel away again."""
        _set(tuple(other for other in _registered() if other is not self))

    def __enter__(self) -> Registration:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.unregister()


@dataclasses.dataclass(frozen=True, eq=False)
class _Registry:
    """All registrations, the latest first. Compared by identity, for JAX does so at every call."""

    registrations: tuple[Registration, ...]


_snapshot = functools.cache(_Registry)
_context = jax.make_user_context(_snapshot(()))
"""The registry, as a part of the keys of JAX's caches."""


def _registered() -> tuple[Registration, ...]:
    return _context.value.registrations


def _set(registrations: tuple[Registration, ...]) -> None:
    _context.set_global(_snapshot(registrations))
