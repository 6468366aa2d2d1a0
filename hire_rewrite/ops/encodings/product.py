"""The product with rows that are stored in blocks of integers with a scale each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from hire_rewrite.ops.kernels import KernelOperation
from hire_rewrite.ops.narrow import block_of, in_chunks, rows_from, times
from hire_rewrite.ops.quantize import rounded_blocks, unpack

__all__ = [
    "Matrix",
    "block_product",
    "block_products",
    "input_block",
    "taken",
    "unpack_unsigned",
    "widened",
]

Matrix = tuple[Array, Array, Array | float | None]
"""Integers, scale and minimum (see `block_product`)."""


@KernelOperation
def block_product(
    x: Array,
    integers: Array,
    scale: Array,
    minimum: Array | float | None,
    layer: Array | int,
    *,
    bits: int,
    round_inputs: bool = False,
) -> Array:
    """x @ rows[layer].T in float32 for rows of integers with a scale for each block of columns.

    A number of a row is scale · integer + minimum, in float32 (see `widened`).

    Args:
      x: [tokens, d].
      integers: i8[L, n, d] for 8 bits, i8[L, n, d/2] for 4: two to a byte, d/2 apart, the first in
        the low bits (as `ops.quantize.unpack` has them). 4 bits are −8…7, with a minimum 0…15.
      scale: [L, n, B], float16, bfloat16 or float32, for B blocks of d/B columns.
      minimum: as `scale`; or one number, for so many times the scale in each block; or None for
        zero.
      layer: i32[].
      bits: 8 or 4.
      round_inputs: whether x is rounded to 8 bits first, with a scale for every `input_block`
        columns (`ops.quantize.rounded_blocks`): processors multiply such numbers many at a time.
        Otherwise x is used as it is in float32, with the precision that
        `jax.default_matmul_precision` sets for any product of float32.

    Returns:
      f32[tokens, n]. Its derivative in x is that of x @ rows[layer].T.

    Examples:
      >>> integers, scale = jnp.array([[[1, 2, -3, 4]]], jnp.int8), jnp.array([[[1.0, 10.0]]])
      >>> block_product(jnp.ones((1, 4)), integers, scale, None, 0, bits=8).tolist()
      [[13.0]]
      >>> block_product(jnp.ones((1, 4)), integers, scale, -scale, 0, bits=8).tolist()
      [[-9.0]]
      >>> block_product(jnp.ones((1, 4)), integers, scale, -1.0, 0, bits=8).tolist()
      [[-9.0]]
    """
    if round_inputs:
        x, precision = rounded_blocks(x, input_block(x, scale)), lax.Precision.DEFAULT
    else:
        x, precision = x.astype(jnp.float32), None
    arrays = (integers, scale) if minimum is None else (integers, scale, jnp.asarray(minimum))
    return lax.platform_dependent(
        x,
        jnp.asarray(layer, jnp.int32),
        *arrays,
        cpu=functools.partial(_product_cpu, bits=bits, precision=precision),
        default=functools.partial(_product_default, bits=bits, precision=precision),
    )


@KernelOperation
def block_products(
    x: Array,
    several: Sequence[Matrix],
    layer: Array | int,
    *,
    bits: int,
    round_inputs: bool = False,
) -> tuple[Array, ...]:
    """`block_product` of the same x with several matrices.

    A kernel rounds x once and reads all of them in one call, where their blocks are equally long.

    Args:
      several: of each, two at least, its integers, scale and minimum.

    Returns:
      f32[tokens, n] of each.

    Examples:
      >>> rows = jnp.array([[[1, 2, -3, 4]]], jnp.int8), jnp.array([[[1.0, 10.0]]]), None
      >>> y, same = block_products(jnp.ones((1, 4)), (rows, rows), 0, bits=8)
      >>> y.tolist(), same.tolist()
      ([[13.0]], [[13.0]])
    """
    settings: dict[str, Any] = {"bits": bits, "round_inputs": round_inputs}
    return tuple(block_product(x, *matrix, layer, **settings) for matrix in several)


def input_block(x: Array, scale: Array) -> int:
    """How many columns of x: [tokens, d] share a scale where x is rounded.

    32 where blocks of the rows are made of those, otherwise a block of the rows. One scale for
    more would lose much: activations have a few that are a hundred times as large as the others.

    Examples:
      >>> row, blocks = jnp.ones((1, 10, 1)), jnp.ones((1, 10, 40))
      >>> input_block(jnp.ones((1, 640)), row), input_block(jnp.ones((1, 640)), blocks)
      (32, 16)
    """
    block = block_of(x, scale)
    return 32 if block % 32 == 0 else block


def widened(
    integers: Array, scale: Array, minimum: Array | float | None = None, *, bits: int
) -> Array:
    """f32[..., n, d], the numbers scale · integer + minimum (see `block_product`).

    Args:
      integers: i8[..., n, d] or i8[..., n, d/2].
      scale: [..., n, B].
      minimum: as `scale`, or one number.

    Examples:
      >>> widened(jnp.array([[0x7F, -128]], jnp.int8), jnp.array([[0.5]]), bits=4).tolist()
      [[-0.5, 0.0, 3.5, -4.0]]
    """
    if bits == 4:
        integers = unpack(integers) if minimum is None else unpack_unsigned(integers)
    blocks = integers.reshape(*scale.shape, integers.shape[-1] // scale.shape[-1])
    blocks, steps = blocks.astype(jnp.float32), scale.astype(jnp.float32)[..., None]
    if minimum is None:
        wide = blocks * steps
    elif jnp.ndim(minimum) == 0:
        wide = (blocks + minimum) * steps
    else:
        wide = blocks * steps + jnp.asarray(minimum, jnp.float32)[..., None]
    return wide.reshape(integers.shape)


def taken(
    matrix: Sequence[Array | float | None], take: Callable[[Array], Array]
) -> tuple[Array, ...]:
    """What `widened` is given of some rows: `take` of each array that has a number for each row."""
    arrays = (jnp.asarray(array) for array in matrix if array is not None)
    return tuple(array if array.ndim == 0 else take(array) for array in arrays)


def unpack_unsigned(packed: Array) -> Array:
    """i8[..., d] in [0, 15] for i8[..., d/2]; see `unpack`."""
    return jnp.concatenate([packed & 15, (packed >> 4) & 15], axis=-1)


def _product_default(
    x: Array, layer: Array, *arrays: Array, bits: int, precision: lax.Precision | None
) -> Array:
    here = taken(arrays, lambda a: lax.dynamic_index_in_dim(a, layer, keepdims=False))
    return times(x, widened(*here, bits=bits), precision)


def _product_cpu(
    x: Array, layer: Array, *arrays: Array, bits: int, precision: lax.Precision | None
) -> Array:
    # Otherwise a loop that calls this with the same rows may widen them ahead of the loop.
    x, *arrays = lax.optimization_barrier((x, *arrays))

    def part(start: Array | int, step: int) -> Array:
        rows = taken(arrays, lambda array: rows_from(array, layer, start, step))
        return widened(*rows, bits=bits)

    return in_chunks(x, arrays[0].shape[1], part, (*arrays, layer), precision)
