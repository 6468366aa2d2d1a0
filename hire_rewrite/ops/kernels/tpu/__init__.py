"""Kernels for TPU, most of them in Pallas: rows are read from HBM, and nothing else is.

XLA widens narrow rows and gathers a few without a copy in HBM, as a rule. But it may bring a whole
weight into VMEM to gather from there, which saves nothing; these kernels never do. The compiler
cannot divide them among devices. Pallas is imported where a program for TPU is compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from hire_rewrite import _compat
from hire_rewrite.ops import gather, narrow
from hire_rewrite.ops.encodings.picked import picked_float_products, picked_float_sum
from hire_rewrite.ops.encodings.product import block_product
from hire_rewrite.ops.kernels import register_kernel
from hire_rewrite.ops.kernels.tpu.fits import (
    fits_blocks,
    fits_groups,
    fits_matmul,
    fits_picked,
    fits_single,
)
from hire_rewrite.ops.quantize import round_blocks
from hire_rewrite.ops.top_k.listed import listed


def _product(
    x: Array, rows: Array, layer: Array, scale: Array | None = None, offset: Array | None = None
) -> Array:
    from hire_rewrite.ops.kernels.tpu import scores

    layer = layer.astype(jnp.int32)
    products_of_rows = scores.matmul(x.astype(jnp.float32), rows, layer)
    return narrow.scaled(products_of_rows, layer, scale, offset)


def _block_matmul(x: Array, packed: Array, scale: Array, layer: Array) -> Array:
    from hire_rewrite.ops.kernels.tpu import blocks

    integers, steps = round_blocks(x, narrow.block_of(x, scale))
    layer = layer.astype(jnp.int32)
    return blocks.block_product(integers, steps, packed, scale, None, layer, bits=4)


def _block_product(
    x: Array,
    integers: Array,
    scale: Array,
    minimum: Array | float | None,
    layer: Array | int,
    *,
    bits: int,
    **_: Any,
) -> Array:
    from hire_rewrite.ops.kernels.tpu import blocks

    layer = jnp.asarray(layer, jnp.int32)
    return blocks.block_product(x, None, integers, scale, minimum, layer, bits=bits)


def _fits_block_product(
    x: Array,
    integers: Array,
    scale: Array,
    minimum: Array | float | None,
    layer: Array | int,
    *,
    bits: int,
    round_inputs: bool = False,
) -> bool:
    """Where x may become bfloat16: as products of float32 do, unless JAX is told otherwise."""
    precision = _compat.default_matmul_precision()
    rounds = round_inputs or precision in (None, "default", "fastest", "bfloat16")
    return rounds and fits_blocks(x, integers, scale, bits=bits)


def _gathered_matmul(
    x: Array, stacked: Array, layer: Array, groups: Array, *, out_dtype: Any, **_: Any
) -> Array:
    from hire_rewrite.ops.kernels.tpu import rows

    flat, index = gather.flattened(stacked, layer, jnp.atleast_2d(groups))
    return rows.gathered_matmul(x, flat, index).astype(out_dtype or x.dtype)


def _fits_matmul(x: Array, stacked: Array, layer: Array, groups: Array, **_: Any) -> bool:
    if groups.ndim == 1:
        return fits_groups(x, stacked)
    return fits_single(x, stacked, groups)


def _gathered_sum(
    h: Array, stacked: Array, layer: Array, groups: Array, *, out_dtype: Any, **_: Any
) -> Array:
    from hire_rewrite.ops.kernels.tpu import rows

    flat, index = gather.flattened(stacked, layer, groups)
    return rows.gathered_sum(h, flat, index).astype(out_dtype or h.dtype)


def _picked_products(x: Array, stacked: Array, layer: Array | int, picked: Array) -> Array:
    from hire_rewrite.ops.kernels.tpu import picked as kernels

    flat, index = gather.flattened(stacked, layer, jnp.maximum(picked, 0))
    products = kernels.picked_products(x, flat[:, 0], index, _ends(picked))
    return jnp.where(picked < 0, 0.0, products)


def _picked_sum(onto: Array, h: Array, stacked: Array, layer: Array | int, picked: Array) -> Array:
    from hire_rewrite.ops.kernels.tpu import picked as kernels

    flat, index = gather.flattened(stacked, layer, jnp.maximum(picked, 0))
    return onto + kernels.picked_sum(h, flat[:, 0], index, _ends(picked))


def _fits_picked(*operands: Any) -> bool:
    *_, vectors, stacked, _, picked = operands
    return fits_picked(vectors, stacked, picked)


def listed_by_sort(mask: Array, *, k: int) -> tuple[Array, Array]:
    """By a sort of the places: the compiler takes a scatter to be three to five times as long."""
    tokens, n = mask.shape
    places = jnp.where(mask, lax.broadcasted_iota(jnp.int32, (tokens, n), 1), n)
    first = lax.sort(places, dimension=1, is_stable=False)[:, :k]
    return jnp.where(first == n, -1, first), mask.sum(1, dtype=jnp.int32)


def _ends(picked: Array) -> Array:
    return (picked >= 0).sum(1, dtype=jnp.int32)


def _in_32_bits(kernel: Callable[..., Array]) -> Callable[..., Array]:
    """A kernel whose loops count in 32 bits, which is all that Pallas takes on TPU."""

    def run(*operands: Any, **settings: Any) -> Array:
        with jax.enable_x64(False):
            return kernel(*operands, **settings)

    return run


for _operation, _function, _supports in (
    (narrow.matmul, _product, fits_matmul),
    (narrow.block_matmul, _block_matmul, fits_blocks),
    (block_product, _block_product, _fits_block_product),
    (gather.gathered_matmul, _gathered_matmul, _fits_matmul),
    (gather.gathered_sum, _gathered_sum, fits_groups),
    (picked_float_products, _picked_products, _fits_picked),
    (picked_float_sum, _picked_sum, _fits_picked),
):
    _function = _in_32_bits(_function)
    register_kernel(_operation, "tpu", _function, supports=_supports, divisible=False)

register_kernel(listed, "tpu", listed_by_sort)
