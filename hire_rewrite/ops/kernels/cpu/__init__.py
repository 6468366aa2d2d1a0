"""Kernels in C++ for CPU: operations without widened or gathered copies.

XLA calls them through its foreign function interface. Installing the package builds them where
there is a C++ compiler; without one everything runs in JAX alone. `status` says which. There are
three forms, and the fastest that the processor knows is used: with the integer products of AVX-512,
with AVX2, and portable. `HIRE_REWRITE_KERNELS=avx2` and `portable` in the environment ask for the
others. They sum in float32, in an order of their own.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from hire_rewrite.ops import gather, narrow
from hire_rewrite.ops.encodings.picked import (
    picked_block_products,
    picked_block_sums,
    picked_float_products,
    picked_float_sum,
)
from hire_rewrite.ops.encodings.product import (
    block_product,
    block_products,
)
from hire_rewrite.ops.kernels import register_kernel
from hire_rewrite.ops.kernels.cpu import blocks
from hire_rewrite.ops.kernels.cpu.library import announce, call, one, status, usable
from hire_rewrite.ops.top_k import select
from hire_rewrite.ops.top_k.listed import listed

__all__ = ["announce", "status", "usable"]


def _product(
    x: Array, rows: Array, layer: Array, scale: Array | None = None, offset: Array | None = None
) -> Array:
    none = jnp.zeros((rows.shape[0], 0), jnp.float32)
    factors = (none if factor is None else factor for factor in (scale, offset))
    shape = x.shape[0], rows.shape[1]
    return call("product", shape, x.astype(jnp.float32), rows, one(layer), *factors)


def _picked_float_products(x: Array, stacked: Array, layer: Array | int, picked: Array) -> Array:
    operands = (stacked, one(layer), picked.astype(jnp.int32))
    return call("listed_product", picked.shape, x.astype(jnp.float32), *operands)


def _picked_float_sum(
    onto: Array, h: Array, stacked: Array, layer: Array | int, picked: Array
) -> Array:
    operands = (h.astype(jnp.float32), stacked, one(layer), picked.astype(jnp.int32))
    return call("listed_sum", onto.shape, onto, *operands)


def _fits_picked_float(vectors: Array, *operands: Any) -> bool:
    *_, stacked, _, picked = operands
    few = isinstance(picked.size, int) and picked.size > 0
    return few and usable(vectors, stacked.dtype) and stacked.dtype != jnp.int8 and stacked.size > 0


def _gathered_matmul(
    x: Array, stacked: Array, layer: Array, groups: Array, *, out_dtype: Any, **_: Any
) -> Array:
    rows, index = gather.flattened(stacked, layer, jnp.atleast_2d(groups))
    shape = (x.shape[0], index.shape[1] * rows.shape[1])
    y = call("fetched_product", shape, x.astype(jnp.float32), rows, index)
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
    y = call("fetched_sum", shape, h.astype(jnp.float32), rows, index)
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
    (narrow.block_matmul, blocks.block_matmul, blocks.fits_block_matmul),
    (block_product, blocks.block_product, blocks.fits_blocks),
    (block_products, blocks.block_products, blocks.fit_blocks),
    (picked_block_products, blocks.picked_products, blocks.fits_picked),
    (picked_block_sums, blocks.picked_sums, blocks.fits_picked_sums),
    (picked_float_products, _picked_float_products, _fits_picked_float),
    (picked_float_sum, _picked_float_sum, _fits_picked_float),
    (gather.gathered_matmul, _gathered_matmul, _fits_matmul),
    (gather.gathered_sum, _gathered_sum, _fits_sum),
    (select.set_apart_operation, _set_apart, _fits_set_apart),
    (select.top_k_operation, _top_k, _fits_top_k),
    (listed, _listed, lambda mask, *, k: k > 0 and usable(mask)),
):
    register_kernel(_operation, "cpu", _function, supports=_supports)
