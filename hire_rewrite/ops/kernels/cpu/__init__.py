"""Kernels in C++ for CPU: operations without widened or gathered copies.

Installing the package builds them where there is a C++ compiler; without one everything runs in JAX
alone. `status` says which. There are three forms, and the fastest that the processor knows is used:
with the integer products of AVX-512, with AVX2, and portable. `HIRE_REWRITE_KERNELS=avx2` and
`portable` in the environment ask for the others. They sum in float32, in an order of their own.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from hire_rewrite.ops import gather, products
from hire_rewrite.ops.kernels import register_kernel
from hire_rewrite.ops.kernels.cpu import targets
from hire_rewrite.ops.kernels.cpu.targets import status
from hire_rewrite.ops.quantize import round_blocks
from hire_rewrite.ops.top_k import select

__all__ = ["status", "usable"]


def usable(x: Array, *dtypes: Any) -> bool:
    """Whether the library is there, x is not empty, and all dtypes are known to it."""
    known = all(dtype is None or jnp.dtype(dtype) in _KNOWN for dtype in dtypes)
    return known and isinstance(x.size, int) and x.size > 0 and status() == "in use"


_KNOWN = frozenset(map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.int8)))


def _product(
    x: Array, rows: Array, layer: Array, scale: Array | None = None, offset: Array | None = None
) -> Array:
    layer = layer.astype(jnp.int32)
    return targets.product(x.astype(jnp.float32), rows, layer, scale, offset)


def _block_product(x: Array, packed: Array, scale: Array, layer: Array) -> Array:
    rounded = round_blocks(x, products.block_of(x, scale))
    return targets.block_product(*rounded, packed, scale, layer.astype(jnp.int32))


def _fits_blocks(x: Array, packed: Array, scale: Array, layer: Array | int) -> bool:
    """The library reads both halves of a row in whole blocks."""
    d, block = x.shape[1], products.block_of(x, scale)
    return usable(x) and (d // 2) % block == 0 and block % 32 == 0 and d <= 65536


def _gathered_matmul(
    x: Array, stacked: Array, layer: Array, groups: Array, *, out_dtype: Any, **_: Any
) -> Array:
    rows, index = gather.flattened(stacked, layer, jnp.atleast_2d(groups))
    return targets.fetched_product(x.astype(jnp.float32), rows, index).astype(out_dtype or x.dtype)


def _fits_matmul(
    x: Array, stacked: Array, layer: Array, groups: Array, *, compute_dtype: Any, out_dtype: Any,
    precision: Any,
) -> bool:  # fmt: skip
    return usable(x, stacked.dtype, x.dtype, compute_dtype, out_dtype)


def _gathered_sum(
    h: Array, stacked: Array, layer: Array, groups: Array, *, out_dtype: Any, **_: Any
) -> Array:
    rows, index = gather.flattened(stacked, layer, groups)
    return targets.fetched_sum(h.astype(jnp.float32), rows, index).astype(out_dtype or h.dtype)


def _fits_sum(
    h: Array, stacked: Array, layer: Array, groups: Array, *, out_dtype: Any, precision: Any
) -> bool:
    return usable(h, stacked.dtype, h.dtype, out_dtype) and stacked.dtype != jnp.int8


def _top_k(scores: Array, *, k: int) -> tuple[Array, Array]:
    return select.through_float32(targets.top_k)(scores, k)


def _fits_top_k(scores: Array, *, k: int) -> bool:
    return k > 0 and select.fits_float32(scores.dtype) and usable(scores)


for _operation, _function, _supports in (
    (products.product, _product, lambda x, rows, *_: usable(x, rows.dtype)),
    (products.block_product, _block_product, _fits_blocks),
    (gather.gathered_matmul, _gathered_matmul, _fits_matmul),
    (gather.gathered_sum, _gathered_sum, _fits_sum),
    (select.top_k_operation, _top_k, _fits_top_k),
):
    register_kernel(_operation, "cpu", _function, supports=_supports)
