"""Products with all rows of one layer, streamed from HBM and widened in VMEM.

`blocks` beside has those of rows in blocks.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hire_rewrite.ops.kernels.tpu.common import in_hbm, result, step_of, times


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
    step = step_of(n, d * rows.dtype.itemsize)

    def kernel(_: Any, x: Any, rows: Any, scores: Any) -> None:
        scores[...] = times(x[...], rows[...].astype(jnp.bfloat16))

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
