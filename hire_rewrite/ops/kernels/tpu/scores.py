"""Products with all rows of one layer, streamed from HBM and widened in VMEM."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hire_rewrite.ops.kernels.tpu.common import in_hbm, result
from hire_rewrite.ops.kernels.tpu.fits import LANES

_BLOCK = 1 << 20
"""Bytes of rows that are in VMEM at a time, twice over: while one block is used, the next comes."""


@functools.partial(jax.jit, static_argnames="interpret")
def matmul(x: Array, rows: Array, layer: Array, *, interpret: bool = False) -> Array:
    """x @ rows[layer].T, both rounded to bfloat16, summed in float32.

    Args:
      x: f32[tokens, d].
      rows: [L, n, d], int8 or bfloat16.
      layer: i32[].

    Returns:
      f32[tokens, n].
    """
    tokens, d = x.shape
    n = rows.shape[1]
    step = _step(n, d * rows.dtype.itemsize)

    def kernel(_: Any, x: Any, rows: Any, scores: Any) -> None:
        scores[...] = _times(x[...], rows[...].astype(jnp.bfloat16))

    return pl.pallas_call(
        kernel,
        out_shape=result((tokens, n), x),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(n, step),),
            in_specs=[
                pl.BlockSpec((tokens, d), lambda i, layer: (0, 0)),
                pl.BlockSpec((None, step, d), lambda i, layer: (layer[0], i, 0)),
            ],
            out_specs=pl.BlockSpec((tokens, step), lambda i, layer: (0, i)),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * tokens * n * d,
            transcendentals=0,
            bytes_accessed=n * d * rows.dtype.itemsize + tokens * (2 * d + 4 * n),
        ),
        name="hire_product",
        interpret=interpret,
    )(layer.reshape(1), x.astype(jnp.bfloat16), in_hbm(rows, interpret))


@functools.partial(jax.jit, static_argnames="interpret")
def block_matmul(
    integers: Array,
    steps: Array,
    packed: Array,
    scale: Array,
    layer: Array,
    *,
    interpret: bool = False,
) -> Array:
    """x @ rows[layer].T for x as `round_blocks` gives it and rows as `quantize_blocks` stored them.

    Integers are multiplied as they are, block by block: as many products as there are blocks, of
    which each has x in its columns and 0 in the others. They are exact; scales come afterwards.

    Args:
      integers: i8[tokens, d].
      steps: f32[tokens, d/block], the scales of x.
      packed: i8[L, n, d/2].
      scale: bf16[L, n, d/block].
      layer: i32[].

    Returns:
      f32[tokens, n].
    """
    tokens, d = integers.shape
    n, half, blocks = packed.shape[1], packed.shape[2], scale.shape[2]
    step = _step(n, half)
    # [2, blocks/2 · tokens, d/2]: half by half, those of each token in each block.
    inside = jnp.arange(half)[None] // (d // blocks) == jnp.arange(blocks // 2)[:, None]
    halves = jnp.swapaxes(integers.reshape(tokens, 2, half), 0, 1).astype(jnp.bfloat16)
    masked = jnp.where(inside[:, None], halves[:, None], 0).reshape(2, -1, half)
    steps = steps.T[:, :, None]
    # XLA stores the scale row by row if that needs no padding, otherwise column by column.
    by_row = blocks % LANES == 0
    if by_row:
        scales, scale_block = (
            scale,
            pl.BlockSpec((None, step, blocks), lambda i, layer: (layer[0], i, 0)),
        )
    else:
        scales = jnp.swapaxes(scale, 1, 2)
        scale_block = pl.BlockSpec((None, blocks, step), lambda i, layer: (layer[0], 0, i))

    def kernel(_: Any, masked: Any, steps: Any, packed: Any, scale: Any, scores: Any) -> None:
        both = packed[...].astype(jnp.int32)
        factors = scale[...].astype(jnp.float32)
        factors = factors.T if by_row else factors
        total = jnp.zeros(scores.shape, jnp.float32)
        for i, numbers in enumerate(((both << 28) >> 28, both >> 4)):
            rows = numbers.astype(jnp.float32).astype(jnp.bfloat16)
            sums = _times(masked[i], rows).reshape(blocks // 2, tokens, step)
            here = slice(i * (blocks // 2), (i + 1) * (blocks // 2))
            total += (sums * steps[here] * factors[here][:, None]).sum(0)
        scores[...] = total

    return pl.pallas_call(
        kernel,
        out_shape=result((tokens, n), packed),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(n, step),),
            in_specs=[
                pl.BlockSpec(masked.shape, lambda i, layer: (0, 0, 0)),
                pl.BlockSpec(steps.shape, lambda i, layer: (0, 0, 0)),
                pl.BlockSpec((None, step, half), lambda i, layer: (layer[0], i, 0)),
                scale_block,
            ],
            out_specs=pl.BlockSpec((tokens, step), lambda i, layer: (0, i)),
        ),
        cost_estimate=pl.CostEstimate(
            flops=tokens * n * d * blocks,
            transcendentals=0,
            bytes_accessed=n * half
            + n * blocks * scale.dtype.itemsize
            + masked.size * 2
            + steps.size * 4
            + tokens * n * 4,
        ),
        name="hire_block_product",
        interpret=interpret,
    )(layer.reshape(1), masked, steps, in_hbm(packed, interpret), in_hbm(scales, interpret))


def _step(n: int, width: int) -> int:
    """Rows of `width` bytes in a block: whole vectors of results, or all of the rows."""
    step = max(1, _BLOCK // (width * LANES)) * LANES
    return n if n <= step else step


def _times(x: Array, rows: Array) -> Array:
    """f32[m, n] = x @ rows.T."""
    dims = (((1,), (1,)), ((), ()))
    return lax.dot_general(
        x, rows, dims, precision=lax.Precision.DEFAULT, preferred_element_type=jnp.float32
    )
