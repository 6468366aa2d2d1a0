"""Products with rows that are stored narrow: what every predictor spends its time on.

One token's scores are one pass over a compressed matrix, so the product must cost no more than
reading it. On accelerators the compiler widens the rows inside the product. XLA's CPU backend
instead writes a widened copy of the whole matrix first, or, inside a `scan`, a copy of one layer
of a stacked matrix. Measured for i8[49152, 576] on two cores: 54 ms that way, 3.4 ms in chunks
that stay in the cache, 1.0 ms where XLA widens inside a fused product; float32 rows 3.5 ms. Of
the same size in 4 bits with a scale for 32: 84 ms that way, 3.7 ms in chunks, float32 rows beside
it about the same; no form was found that XLA fuses. The kernels of `ops.kernels` need no copies;
what is here for CPU runs where they are not built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array, lax

from hire_rewrite import _compat
from hire_rewrite.ops.kernels import KernelOperation
from hire_rewrite.ops.quantize import dequantize_blocks, rounded_blocks

_CHUNK = 3 << 18
"""Elements that are widened at a time on CPU: 3 MiB as float32. Chunks of 256 K to 3 M elements
were tried; smaller ones pay for the loop, larger ones leave the cache."""

_PRECISION = lax.Precision.DEFAULT
"""Whatever `jax.default_matmul_precision` says: the bounds of errors count on it."""

_FUSED_TOKENS = 4
"""With more tokens one matrix product in chunks beats a fused product for each."""

__all__ = ["block_matmul", "block_of", "in_chunks", "matmul", "rows_from", "scaled", "times"]


@KernelOperation
def matmul(
    x: Array,
    rows: Array,
    layer: Array | int,
    scale: Array | None = None,
    offset: Array | None = None,
) -> Array:
    """x @ rows[layer].T in float32, reading the rows once and as narrow as they are.

    Args:
      x: [tokens, d].
      rows: [L, n, d], int8, bfloat16 or float32.
      layer: i32[].
      scale: f32[L, n], what each row is to be multiplied with; None for one.
      offset: f32[L, n], what is added to its products; None for nothing.

    Returns:
      f32[tokens, n].
    """
    x, layer = x.astype(jnp.float32), jnp.asarray(layer, jnp.int32)
    products = lax.platform_dependent(x, rows, layer, cpu=_matmul_cpu, default=_matmul_default)
    return scaled(products, layer, scale, offset)


def scaled(products: Array, layer: Array, scale: Array | None, offset: Array | None) -> Array:
    """f32[tokens, n], products · scale[layer] + offset[layer]; see `matmul`."""
    if scale is not None:
        products = products * lax.dynamic_index_in_dim(scale, layer)
    if offset is not None:
        products = products + lax.dynamic_index_in_dim(offset, layer)
    return products


@KernelOperation
def block_matmul(x: Array, packed: Array, scale: Array, layer: Array | int) -> Array:
    """x @ rows[layer].T in float32 for rows that `quantize_blocks` stored.

    x is rounded to 8 bits in the same blocks (`round_blocks`): processors multiply such numbers
    many at a time, and the rows have lost much more.

    Args:
      x: [tokens, d].
      packed: i8[L, n, d/2].
      scale: bf16[L, n, d/block].
      layer: i32[].

    Returns:
      f32[tokens, n].
    """
    x, layer = rounded_blocks(x, block_of(x, scale)), jnp.asarray(layer, jnp.int32)
    forms = {"cpu": _block_matmul_cpu, "default": _block_matmul_default}
    return lax.platform_dependent(x, packed, scale, layer, **forms)


def block_of(x: Array, scale: Array) -> int:
    """How many columns of x: [tokens, d] share a scale: [L, n, d/block]."""
    return x.shape[1] // scale.shape[2]


def _block_matmul_default(x: Array, packed: Array, scale: Array, layer: Array) -> Array:
    here = (lax.dynamic_index_in_dim(array, layer, keepdims=False) for array in (packed, scale))
    return times(x, dequantize_blocks(*here))


def _block_matmul_cpu(x: Array, packed: Array, scale: Array, layer: Array) -> Array:
    x, packed, scale = lax.optimization_barrier((x, packed, scale))

    def part(start: Array | int, step: int) -> Array:
        return dequantize_blocks(
            *(rows_from(array, layer, start, step) for array in (packed, scale))
        )

    return in_chunks(x, packed.shape[1], part, (packed, scale, layer))


def _matmul_default(x: Array, rows: Array, layer: Array) -> Array:
    here = lax.dynamic_index_in_dim(rows, layer, keepdims=False)
    if rows.dtype in (jnp.int8, jnp.bfloat16):
        # int8 is exact in bfloat16, and both operands alike take the matrix unit. The rounding of
        # x (2⁻⁸ at most) is less than that of the rows.
        return times(x.astype(jnp.bfloat16), here.astype(jnp.bfloat16))
    # Rows that stayed wide are few, and matrix units would round them.
    return times(x, here, lax.Precision.HIGHEST)


def _matmul_cpu(x: Array, rows: Array, layer: Array) -> Array:
    tokens, n = x.shape[0], rows.shape[1]
    # Otherwise XLA repeats the computation of x, at least its cast, for every row; and if a loop
    # calls this with the same rows, it widens them ahead of the loop.
    x, rows = lax.optimization_barrier((x, rows))
    few = isinstance(tokens, int) and 0 < tokens <= _FUSED_TOKENS
    if _compat.cpu_fuses_widening and few:
        here = lax.dynamic_index_in_dim(rows, layer, keepdims=False).astype(jnp.float32)
        # Vector times transposed matrix, and nothing else, is the form that XLA fuses.
        return jnp.stack([jnp.matmul(row, here.T, precision=_PRECISION) for row in x])

    def part(start: Array | int, step: int) -> Array:
        return rows_from(rows, layer, start, step).astype(jnp.float32)

    return in_chunks(x, n, part, (rows, layer))


def in_chunks(
    x: Array,
    n: int,
    part: Callable[[Array | int, int], Array],
    sources: Sequence[Array],
    precision: lax.Precision | None = _PRECISION,
) -> Array:
    """x @ rows.T: f32[tokens, n], where part(start, step) gives f32[step, d] of the n rows.

    Args:
      sources: the arrays that `part` reads.
      precision: as in `lax.dot_general`.
    """
    tokens, d = x.shape
    chunks = -(-n // max(1, _CHUNK // d))
    step = -(-n // chunks)
    if chunks == 1:
        return times(x, part(0, n), precision)

    def body(i: Array, scores: Array) -> Array:
        # The last chunk begins early, so that it ends with the rows: some are computed twice.
        start = jnp.minimum(i * step, n - step)
        products = times(x, part(start, step), precision)
        return lax.dynamic_update_slice_in_dim(scores, products, start, 1)

    axes = _compat.varying_axes((x, *sources))
    empty = _compat.varying_over(jnp.zeros((tokens, n), jnp.float32), axes)
    return lax.fori_loop(0, chunks, body, empty)


def rows_from(stacked: Array, layer: Array, start: Array | int, step: int) -> Array:
    """stacked[layer, start : start + step] of [L, n, ...], without a copy of the layer."""
    first = (layer, jnp.asarray(start, layer.dtype), jnp.zeros((), layer.dtype))
    return lax.dynamic_slice(stacked, first, (1, step, stacked.shape[2]))[0]


def times(x: Array, rows: Array, precision: lax.Precision | None = _PRECISION) -> Array:
    """x @ rows.T: f32[tokens, n] for x: [tokens, d] and rows: [n, d] of one dtype."""
    return lax.dot_general(
        x,
        rows,
        (((1,), (1,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
