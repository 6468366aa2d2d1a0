"""Kernels in C++ for CPU: operations without widened or gathered copies.

XLA calls them through its foreign function interface. Installing the package builds them where
there is a C++ compiler; without one everything runs in JAX alone. `status` says which. There are
three forms, and the fastest that the processor knows is used: with the integer products of AVX-512,
with AVX2, and portable. `HIRE_REWRITE_KERNELS=avx2` and `portable` in the environment ask for the
others. They sum in float32, in an order of their own.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hire_rewrite.ops import gather, narrow
from hire_rewrite.ops.encodings.picked import (
    picked_block_products,
    picked_block_sums,
    picked_float_products,
    picked_float_sum,
)
from hire_rewrite.ops.encodings.product import (
    Matrix,
    block_product,
    block_products,
    input_block,
)
from hire_rewrite.ops.kernels import register_kernel
from hire_rewrite.ops.top_k import select
from hire_rewrite.ops.top_k.listed import listed

__all__ = ["status", "usable"]

_VERSION = 8
"""Of the targets' operands; see `targets.cc`."""

_TARGETS = (
    "block_product",
    "fetched_product",
    "fetched_sum",
    "listed",
    "listed_product",
    "listed_sum",
    "picked_product",
    "picked_sum",
    "product",
    "set_apart",
    "top_k",
)
_KNOWN = frozenset(map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.int8)))
_FACTORS = frozenset(map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.float16)))


@functools.cache
def status() -> str:
    """`"in use"`, or why they are not."""
    if os.environ.get("HIRE_REWRITE_KERNELS") == "0":
        return "not in use: HIRE_REWRITE_KERNELS=0"
    folder = Path(__file__).parent
    paths = (folder / f"_library{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    built = [path for path in paths if path.exists()]
    if not built:
        return "not built: install again where a C++ compiler is found"
    try:
        library = ctypes.CDLL(str(built[0]))
        if not hasattr(library, "hire_version") or library.hire_version() != _VERSION:
            return "not in use: built from other sources; install again"
        for name in _TARGETS:
            target = jax.ffi.pycapsule(getattr(library, f"hire_{name}"))
            jax.ffi.register_ffi_target(f"hire_{name}", target, platform="cpu")
    except Exception as error:  # a kernel is never worth a failed import
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return f"not in use: built for another jaxlib ({reason}); install again"
    return "in use"


def usable(x: Array, *dtypes: Any) -> bool:
    """Whether the library is there, x is not empty, and all dtypes are known to it."""
    known = all(dtype is None or jnp.dtype(dtype) in _KNOWN for dtype in dtypes)
    return known and isinstance(x.size, int) and x.size > 0 and status() == "in use"


def _call(name: str, shape: tuple[int, ...], *operands: Array, **attributes: Any) -> Array:
    """f32[shape]. Floating-point vectors are f32, what chooses is i32."""
    (result,) = _calls(name, [shape], *operands, **attributes)
    return result


def _calls(
    name: str, shapes: Sequence[tuple[int, ...]], *operands: Array, **attributes: Any
) -> Sequence[Array]:
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    call = jax.ffi.ffi_call(f"hire_{name}", results, vmap_method="sequential")
    return call(*operands, **attributes)


def _product(
    x: Array, rows: Array, layer: Array, scale: Array | None = None, offset: Array | None = None
) -> Array:
    none = jnp.zeros((rows.shape[0], 0), jnp.float32)
    factors = (none if factor is None else factor for factor in (scale, offset))
    shape = x.shape[0], rows.shape[1]
    return _call("product", shape, x.astype(jnp.float32), rows, _one(layer), *factors)


def _block_product(
    x: Array,
    integers: Array,
    scale: Array,
    minimum: Array | float | None,
    layer: Array | int,
    *,
    bits: int,
    round_inputs: bool = False,
) -> Array:
    matrix = integers, scale, minimum
    (y,) = _block_products(x, (matrix,), layer, bits=bits, round_inputs=round_inputs)
    return y


def _block_products(
    x: Array,
    several: Sequence[Matrix],
    layer: Array | int,
    *,
    bits: int,
    round_inputs: bool = False,
) -> Sequence[Array]:
    rounded = input_block(x, several[0][1]) if round_inputs else 0
    return _products_of_blocks(x, several, layer, rounded)


def _picked_products(
    x: Array,
    matrix: Matrix,
    layer: Array | int,
    picked: Array,
    *,
    bits: int,
) -> Array:
    operands = (*_operands([matrix]), _one(layer), picked.astype(jnp.int32))
    return _call("picked_product", picked.shape, x.astype(jnp.float32), *operands)


def _picked_sums(
    ontos: Sequence[Array],
    h: Array,
    several: Sequence[Matrix],
    layer: Array | int,
    picked: Array,
    *,
    bits: int,
) -> Sequence[Array]:
    operands = [h.astype(jnp.float32), _one(layer), picked.astype(jnp.int32)]
    for onto, matrix in zip(ontos, several, strict=True):
        operands += onto, *_operands([matrix])
    return _calls("picked_sum", [onto.shape for onto in ontos], *operands)


def _block_matmul(x: Array, packed: Array, scale: Array, layer: Array | int) -> Array:
    (y,) = _products_of_blocks(x, [(packed, scale, None)], layer, narrow.block_of(x, scale))
    return y


def _products_of_blocks(
    x: Array, several: Sequence[Matrix], layer: Array | int, rounded: int
) -> Sequence[Array]:
    """`block_products` of x rounded to 8 bits in blocks of so many columns, of x itself for 0."""
    operands = (x.astype(jnp.float32), _one(layer), *_operands(several))
    shapes = [(x.shape[0], integers.shape[1]) for integers, *_ in several]
    return _calls("block_product", shapes, *operands, input_block=np.int64(rounded))


def _picked_float_products(x: Array, stacked: Array, layer: Array | int, picked: Array) -> Array:
    operands = (stacked, _one(layer), picked.astype(jnp.int32))
    return _call("listed_product", picked.shape, x.astype(jnp.float32), *operands)


def _picked_float_sum(
    onto: Array, h: Array, stacked: Array, layer: Array | int, picked: Array
) -> Array:
    operands = (h.astype(jnp.float32), stacked, _one(layer), picked.astype(jnp.int32))
    return _call("listed_sum", onto.shape, onto, *operands)


def _fits_picked_float(vectors: Array, *operands: Any) -> bool:
    *_, stacked, _, picked = operands
    few = isinstance(picked.size, int) and picked.size > 0
    return few and usable(vectors, stacked.dtype) and stacked.dtype != jnp.int8 and stacked.size > 0


def _operands(several: Sequence[Matrix]) -> list[Array]:
    """Of each matrix its three arrays; the last may be empty, or one number."""
    operands: list[Array] = []
    for integers, scale, minimum in several:
        if minimum is None:
            minimum = jnp.zeros((*scale.shape[:2], 0), scale.dtype)
        elif jnp.ndim(minimum) == 0:
            minimum = jnp.asarray(minimum, jnp.float32).reshape(1)
        operands += integers, scale, jnp.asarray(minimum)
    return operands


def _one(layer: Array | int) -> Array:
    return jnp.asarray(layer, jnp.int32).reshape(1)


def _fits_blocks(
    x: Array,
    integers: Array,
    scale: Array,
    minimum: Array | float | None,
    layer: Array | int,
    *,
    bits: int,
    round_inputs: bool = False,
) -> bool:
    """The library reads rows, and of 4 bits their halves, in pieces of 32 columns."""
    if not usable(x) or integers.size == 0:
        return False
    d, blocks = x.shape[1], scale.shape[2]
    known = jnp.dtype(scale.dtype) in _FACTORS
    if minimum is not None and jnp.ndim(minimum):
        known = known and jnp.result_type(minimum) in _FACTORS
    whole = d % (32 * blocks) == 0 and (bits == 8 or d // 2 % 32 == 0)
    return known and whole and d <= 65536 and integers.dtype == jnp.int8


def _fit_blocks(
    x: Array,
    several: Sequence[Matrix],
    layer: Array | int,
    *,
    bits: int,
    round_inputs: bool = False,
) -> bool:
    """Those of one form, all of which fit."""
    forms = {(scale.shape[2], minimum is None) for _, scale, minimum in several}
    settings: dict[str, Any] = {"bits": bits, "round_inputs": round_inputs}
    return len(forms) == 1 and all(_fits_blocks(x, *m, layer, **settings) for m in several)


def _fits_picked(
    x: Array,
    matrix: Matrix,
    layer: Array | int,
    picked: Array,
    *,
    bits: int,
) -> bool:
    few = isinstance(picked.size, int) and picked.size > 0
    return few and _fits_blocks(x, *matrix, layer, bits=bits)


def _fits_picked_sums(
    ontos: Sequence[Array], h: Array, several: Sequence[Matrix], *rest: Any, bits: int
) -> bool:
    pairs = zip(ontos, several, strict=True)
    return all(_fits_picked(onto, matrix, *rest, bits=bits) for onto, matrix in pairs)


def _fits_block_matmul(x: Array, packed: Array, scale: Array, layer: Array | int) -> bool:
    return _fits_blocks(x, packed, scale, None, layer, bits=4)


def _gathered_matmul(
    x: Array, stacked: Array, layer: Array, groups: Array, *, out_dtype: Any, **_: Any
) -> Array:
    rows, index = gather.flattened(stacked, layer, jnp.atleast_2d(groups))
    shape = (x.shape[0], index.shape[1] * rows.shape[1])
    y = _call("fetched_product", shape, x.astype(jnp.float32), rows, index)
    return y.astype(out_dtype or x.dtype)


def _fits_matmul(
    x: Array, stacked: Array, layer: Array, groups: Array, *, compute_dtype: Any, out_dtype: Any,
    precision: Any,
) -> bool:  # fmt: skip
    return usable(x, stacked.dtype, x.dtype, compute_dtype, out_dtype)


def _gathered_sum(
    h: Array, stacked: Array, layer: Array, groups: Array, *, out_dtype: Any, **_: Any
) -> Array:
    rows, index = gather.flattened(stacked, layer, groups)
    shape = (h.shape[0], rows.shape[2])
    y = _call("fetched_sum", shape, h.astype(jnp.float32), rows, index)
    return y.astype(out_dtype or h.dtype)


def _fits_sum(
    h: Array, stacked: Array, layer: Array, groups: Array, *, out_dtype: Any, precision: Any
) -> bool:
    return usable(h, stacked.dtype, h.dtype, out_dtype) and stacked.dtype != jnp.int8


def _top_k(scores: Array, *, k: int) -> tuple[Array, Array]:
    def of_float32(scores: Array, k: int) -> tuple[Array, Array]:
        shape = (*scores.shape[:-1], k)
        results = [jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.float32, jnp.int32)]
        values, places = jax.ffi.ffi_call("hire_top_k", results, vmap_method="expand_dims")(scores)
        return values, places

    return select.through_float32(of_float32)(scores, k)


def _set_apart(values: Array, scores: Array, *, k: int) -> tuple[Array, Array, Array]:
    (tokens, n), groups, f32 = values.shape, scores.shape[1], jnp.float32
    results = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((tokens, k), jnp.int32),
            ((tokens, k * (n // groups)), f32),
            ((tokens, n), f32),
        )
    ]
    call = jax.ffi.ffi_call("hire_set_apart", results, vmap_method="sequential")
    places, apart, others = call(values.astype(f32), scores.astype(f32))
    return places, apart.astype(values.dtype), others.astype(values.dtype)


def _listed(mask: Array, *, k: int) -> tuple[Array, Array]:
    tokens = mask.shape[0]
    results = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((tokens, k), (tokens,))]
    call = jax.ffi.ffi_call("hire_listed", results, vmap_method="sequential")
    places, counts = call(mask)
    return places, counts


def _fits_set_apart(values: Array, scores: Array, *, k: int) -> bool:
    narrow = all(select.is_narrow_float(array.dtype) for array in (values, scores))
    return k > 0 and narrow and usable(values)


def _fits_top_k(scores: Array, *, k: int) -> bool:
    return k > 0 and select.fits_float32(scores.dtype) and usable(scores)


for _operation, _function, _supports in (
    (narrow.matmul, _product, lambda x, rows, *_: usable(x, rows.dtype)),
    (narrow.block_matmul, _block_matmul, _fits_block_matmul),
    (block_product, _block_product, _fits_blocks),
    (block_products, _block_products, _fit_blocks),
    (picked_block_products, _picked_products, _fits_picked),
    (picked_block_sums, _picked_sums, _fits_picked_sums),
    (picked_float_products, _picked_float_products, _fits_picked_float),
    (picked_float_sum, _picked_float_sum, _fits_picked_float),
    (gather.gathered_matmul, _gathered_matmul, _fits_matmul),
    (gather.gathered_sum, _gathered_sum, _fits_sum),
    (select.set_apart_operation, _set_apart, _fits_set_apart),
    (select.top_k_operation, _top_k, _fits_top_k),
    (listed, _listed, lambda mask, *, k: k > 0 and usable(mask)),
):
    register_kernel(_operation, "cpu", _function, supports=_supports)
