"""Products with rows that are stored narrow: what every predictor spends its time on.

One token's scores are one pass over a compressed matrix, so the product must cost no more than
reading it. On accelerators the compiler widens the rows inside the product. XLA's CPU backend
instead writes a widened copy of the whole matrix first, or, inside a `scan`, a copy of one layer
of a stacked matrix. Measured for i8[49152, 576] on two cores: 54 ms that way, 3.4 ms in chunks
that stay in the cache, 1.0 ms where XLA widens inside a fused product; float32 rows 3.5 ms.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from hire_rewrite import _compat

_CHUNK = 3 << 18
"""Elements that are widened at a time on CPU: 3 MiB as float32. Chunks of 256 K to 3 M elements
were tried; smaller ones pay for the loop, larger ones leave the cache."""

_FUSED_TOKENS = 4
"""With more tokens one matrix product in chunks beats a fused product for each."""


def quantize_rows(rows: Array) -> tuple[Array, Array]:
    """Symmetric 8-bit rows, each with its own scale.

    Args:
      rows: [..., n, d].

    Returns:
      i8[..., n, d] and f32[..., n]; rows ≈ scale · integers, off by at most scale / 2. The scale
      of a row that holds NaN or infinity is NaN or infinity, so that its products are NaN.
    """
    rows = rows.astype(jnp.float32)
    scale = jnp.abs(rows).max(-1) / 127.0
    integers = jnp.round(rows / jnp.where(scale == 0, 1.0, scale)[..., None])
    return integers.astype(jnp.int8), scale


def product(x: Array, rows: Array, layer: Array | int) -> Array:
    """x @ rows[layer].T in float32, reading the rows once and as narrow as they are.

    Args:
      x: [tokens, d].
      rows: [L, n, d], int8 or float32.
      layer: i32[].

    Returns:
      f32[tokens, n].
    """
    x = x.astype(jnp.float32)
    return lax.platform_dependent(
        x, rows, jnp.asarray(layer, jnp.int32), cpu=_product_cpu, default=_product_default
    )


def _product_default(x: Array, rows: Array, layer: Array) -> Array:
    here = lax.dynamic_index_in_dim(rows, layer, keepdims=False)
    if rows.dtype == jnp.int8:
        # int8 is exact in bfloat16, and both operands alike take the matrix unit. The rounding of
        # x (2⁻⁹) is less than that of the rows.
        x, here = x.astype(jnp.bfloat16), here.astype(jnp.bfloat16)
    return lax.dot_general(x, here, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _product_cpu(x: Array, rows: Array, layer: Array) -> Array:
    tokens, n = x.shape[0], rows.shape[1]
    # Otherwise XLA repeats the computation of x, at least its cast, for every row; and if a loop
    # calls this with the same rows, it widens them ahead of the loop.
    x, rows = lax.optimization_barrier((x, rows))
    if _compat.cpu_fuses_widening and tokens <= _FUSED_TOKENS:
        here = lax.dynamic_index_in_dim(rows, layer, keepdims=False).astype(jnp.float32)
        # Vector times transposed matrix, and nothing else, is the form that XLA fuses.
        return jnp.stack([row @ here.T for row in x])
    chunks = -(-n // max(1, _CHUNK // rows.shape[2]))
    step = -(-n // chunks)

    def chunk(start: Array | int) -> Array:
        part = lax.dynamic_slice(rows, (layer, start, 0), (1, step, rows.shape[2]))[0]
        return lax.dot_general(x, part.astype(jnp.float32), (((1,), (1,)), ((), ())))

    if chunks == 1:
        return chunk(0)

    def body(i: Array, scores: Array) -> Array:
        # The last chunk begins early, so that it ends with the rows: some are computed twice.
        start = jnp.minimum(i * step, n - step)
        return lax.dynamic_update_slice(scores, chunk(start), (0, start))

    return lax.fori_loop(0, chunks, body, jnp.zeros((tokens, n), jnp.float32))
