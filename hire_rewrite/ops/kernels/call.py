"""The primitive behind a `KernelOperation`: its type, derivative, batching and lowering."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from hire_rewrite import _compat

__all__ = ["Call", "Kernel", "call_p"]

Leaves = Callable[..., list[Array]]
"""A function of arrays to a list of arrays."""


@dataclasses.dataclass(frozen=True, eq=False)
class Kernel:
    """A function that computes an operation on one platform (see `register_kernel`)."""

    platform: str
    function: Callable[..., Any]
    supports: Callable[..., bool]
    divisible: bool


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of an operation: all of it but the arrays.

    Attributes:
      operation: its reference, a function of the operands and settings.
      kernels: those that may compute it, at most one of each platform.
      tree: how the arrays make up the operands.
      settings: pairs of a name and a value.
      precision: `jax.default_matmul_precision` at the call, which may be lowered elsewhere.
      batches: for each `vmap` around, the first one inside, the axes of the arrays and the size.
    """

    operation: Callable[..., Any]
    kernels: tuple[Kernel, ...]
    tree: Any
    settings: tuple[tuple[str, Any], ...]
    precision: str | None
    batches: tuple[tuple[tuple[int | None, ...], int], ...] = ()

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.settings)
        return f"{self.operation.__name__}({settings})"

    @property
    def reference(self) -> Leaves:
        """What computes it in JAX."""
        return _leaves(self, self.operation)

    def function(self, platforms: Sequence[str], *, divided: bool) -> Leaves | None:
        """What is registered to compute it on a platform; None for nothing.

        Args:
          platforms: those of a program. On more than one the reference runs.
          divided: whether the compiler divides the program among devices.
        """
        for kernel in self.kernels:
            if (kernel.divisible or not divided) and _names(kernel.platform, platforms):
                return _leaves(self, kernel.function)
        return None


@functools.cache  # so that JAX traces it once
def _leaves(call: Call, function: Callable[..., Any]) -> Leaves:
    def run(*leaves: Array) -> list[Array]:
        operands = jax.tree.unflatten(call.tree, leaves)
        with jax.default_matmul_precision(call.precision):
            return jax.tree.leaves(function(*operands, **dict(call.settings)))

    for axes, size in call.batches:
        run = jax.vmap(run, in_axes=axes, axis_size=size)
    return run


def _names(platform: str, platforms: Sequence[str]) -> bool:
    names = ("cuda", "rocm") if platform == "gpu" else (platform,)
    return len(platforms) == 1 and platforms[0] in names


def _abstract(*avals: Any, call: Call) -> list[Any]:
    return jax.make_jaxpr(call.reference)(*avals).out_avals


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, call: Call) -> tuple[Any, Any]:
    moving = [i for i, tangent in enumerate(tangents) if type(tangent) is not ad.Zero]

    def of_moving(*some: Array) -> list[Array]:
        known = dict(zip(moving, some, strict=True))
        return call.reference(*(known.get(i, primal) for i, primal in enumerate(primals)))

    points, ways = ([arrays[i] for i in moving] for arrays in (primals, tangents))
    moved = jax.jvp(of_moving, points, ways)[1]
    results = call_p.bind(*primals, call=call)
    return results, [
        ad.Zero(jax.typeof(result).to_tangent_aval()) if way.dtype == jax.dtypes.float0 else way
        for result, way in zip(results, moved, strict=True)
    ]


def _batch(
    axis: Any, operands: Sequence[Array], dims: Sequence[int | None], *, call: Call
) -> tuple[Any, tuple[int | None, ...]]:
    if all(dim is None for dim in dims):  # JAX asks for these too
        results = call_p.bind(*operands, call=call)
        return results, (None,) * len(results)
    batched = dataclasses.replace(call, batches=(*call.batches, (tuple(dims), axis.size)))
    results = call_p.bind(*operands, call=batched)
    return results, (0,) * len(results)


def _lowering(context: Any, *operands: Any, call: Call) -> Any:
    function = None
    if not _compat.is_exported(context):
        platforms, divided = _compat.platforms(context), _compat.is_divided(context)
        function = call.function(platforms, divided=divided)
    if function is not None and call.batches and not _takes(function, context.avals_in):
        function = None
    run = call.reference if function is None else _alike(function)
    return mlir.lower_fun(run, multiple_results=True)(context, *operands)


def _takes(function: Leaves, avals: Sequence[Any]) -> bool:
    """Whether a kernel can be batched so: those for TPU take no batch of weights."""
    try:
        jax.make_jaxpr(function)(*avals)
    except NotImplementedError:
        return False
    return True


def _alike(kernel: Leaves) -> Leaves:
    """A kernel whose operands have, inside `shard_map`, the type that all of them fit."""

    def run(*operands: Array) -> list[Array]:
        return kernel(*_compat.varying_alike(operands))

    return run


call_p = Primitive("hire_kernel")
call_p.multiple_results = True
call_p.def_abstract_eval(_abstract)
ad.primitive_jvps[call_p] = _jvp
batching.fancy_primitive_batchers[call_p] = _batch
mlir.register_lowering(call_p, _lowering)


@functools.partial(jax.jit, static_argnames="call")
def _compiled(*operands: Array, call: Call) -> list[Array]:
    return call_p.bind(*operands, call=call)


def _run(*operands: Array, call: Call) -> list[Array]:
    with jax.disable_jit(False):  # or it would call itself
        return _compiled(*operands, call=call)


call_p.def_impl(_run)
