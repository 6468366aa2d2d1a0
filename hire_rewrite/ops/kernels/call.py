"""A function in JAX that some platforms compute by a kernel."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array, lax
from jax.core import ShapedArray
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from hire_rewrite import _compat

__all__ = ["call"]

Function = Callable[..., Any]


def call(
    reference: Function,
    *operands: Array,
    cpu: Function | None = None,
    tpu: Function | None = None,
) -> Any:
    """`reference` of the operands, computed by a kernel on the platforms that one is given for.

    Its derivatives are those of the reference. Where a program is exported (`jax.export`), all
    compute the reference: the process that runs it need not have the kernels. So does TPU where
    the compiler divides arrays among devices, for it cannot divide a kernel.

    Args:
      reference: from arrays to an array or a tuple of arrays.
      cpu, tpu: the same on a platform; None if there is no kernel for these operands.
    """
    if os.environ.get("HIRE_REWRITE_KERNELS") == "0":
        return reference(*operands)
    given = {"cpu": cpu, "tpu": tpu}
    kernels = {name: _typed(_portable(one, reference)) for name, one in given.items() if one}
    if not kernels:
        return reference(*operands)
    platforms = {**kernels, "default": reference}

    @jax.custom_jvp
    def run(*operands: Array) -> Any:
        return lax.platform_dependent(*operands, **platforms)

    def derivative(primals: tuple[Array, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
        moving = [i for i, one in enumerate(tangents) if not isinstance(one, SymbolicZero)]

        def of_moving(*some: Array) -> Any:
            known = dict(zip(moving, some, strict=True))
            return reference(*(known.get(i, one) for i, one in enumerate(primals)))

        points, ways = ([each[i] for i in moving] for each in (primals, tangents))
        return run(*primals), jax.jvp(of_moving, points, ways)[1]

    run.defjvp(derivative, symbolic_zeros=True)
    return run(*operands)


def _typed(kernel: Function) -> Function:
    """A kernel whose results have, inside `shard_map`, the types that JAX would give them."""

    def run(*operands: Array) -> Any:
        axes = _compat.varying_axes(operands)
        operands = tuple(_compat.varying_over(one, axes) for one in operands)
        return jax.tree.map(lambda leaf: _compat.varying_over(leaf, axes), kernel(*operands))

    return run


def _portable(kernel: Function, reference: Function) -> Function:
    """A kernel in programs that run here, its reference in those that are exported."""

    def run(*operands: Array) -> Any:
        shapes, tree = jax.tree.flatten(jax.eval_shape(reference, *map(_shape, operands)))
        results = tuple((shape.shape, shape.dtype) for shape in shapes)
        found = kernel_p.bind(*operands, kernel=kernel, reference=reference, results=results)
        return jax.tree.unflatten(tree, found)

    return run


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


# Its parameters:
#   kernel, reference  functions of the operands with the same results
#   results            their shapes and dtypes


def _abstract(*_: Any, results: Sequence[tuple[Any, Any]], **__: Any) -> list[ShapedArray]:
    return [ShapedArray(shape, dtype) for shape, dtype in results]


def _lowering(
    context: Any, *operands: Any, kernel: Function, reference: Function, results: Any
) -> Any:
    function = reference if _compat.is_exported(context) else kernel
    return _lowered(context, function, operands)


def _lowering_for_tpu(
    context: Any, *operands: Any, kernel: Function, reference: Function, results: Any
) -> Any:
    refused = _compat.is_exported(context) or _compat.is_divided(context)
    return _lowered(context, reference if refused else kernel, operands)


def _lowered(context: Any, function: Function, operands: Sequence[Any]) -> Any:
    def leaves(*operands: Array) -> list[Array]:
        return jax.tree.leaves(function(*operands))

    return mlir.lower_fun(leaves, multiple_results=True)(context, *operands)


def _batch(
    axis: Any,
    operands: Sequence[Array],
    dims: Sequence[int | None],
    *,
    kernel: Function,
    reference: Function,
    results: Sequence[tuple[Any, Any]],
) -> tuple[Any, Any]:
    kernel, reference = (
        jax.vmap(one, in_axes=tuple(dims), axis_size=axis.size) for one in (kernel, reference)
    )
    try:
        jax.eval_shape(kernel, *map(_shape, operands))
    except NotImplementedError:  # those for TPU take no batch of weights
        kernel = reference
    results = tuple(((axis.size, *shape), dtype) for shape, dtype in results)
    found = kernel_p.bind(*operands, kernel=kernel, reference=reference, results=results)
    return found, (0,) * len(found)


kernel_p = Primitive("hire_kernel")
kernel_p.multiple_results = True
kernel_p.def_abstract_eval(_abstract)
kernel_p.def_impl(lambda *operands, kernel, **_: jax.tree.leaves(kernel(*operands)))
batching.fancy_primitive_batchers[kernel_p] = _batch
mlir.register_lowering(kernel_p, _lowering)
mlir.register_lowering(kernel_p, _lowering_for_tpu, platform="tpu")
