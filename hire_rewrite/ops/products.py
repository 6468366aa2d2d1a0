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

import functools
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array, lax

from hire_rewrite import _compat
from hire_rewrite.ops import kernels

_CHUNK = 3 << 18
"""Elements that are widened at a time on CPU: 3 MiB as float32. Chunks of 256 K to 3 M elements
were tried; smaller ones pay for the loop, larger ones leave the cache."""

_PRECISION = lax.Precision.DEFAULT
"""Whatever `jax.default_matmul_precision` says: the bounds of errors count on it."""

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


def product(
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
    factors = [one for one in (scale, offset) if one is not None]

    def both(factors: tuple[Array, ...]) -> tuple[Array | None, Array | None]:
        rest = list(factors)
        return (None if scale is None else rest.pop(0)), (None if offset is None else rest.pop(0))

    def by_cpu(x: Array, rows: Array, layer: Array, *factors: Array) -> Array:
        return kernels.cpu.product(x, rows, layer, *both(factors))

    def scaled(found: Array, layer: Array, factors: tuple[Array, ...]) -> Array:
        scale, offset = (
            one if one is None else lax.dynamic_index_in_dim(one, layer, keepdims=False)
            for one in both(factors)
        )
        found = found if scale is None else found * scale
        return found if offset is None else found + offset

    def by_tpu(x: Array, rows: Array, layer: Array, *factors: Array) -> Array:
        return scaled(kernels.tpu.product(x, rows, layer), layer, factors)

    def reference(x: Array, rows: Array, layer: Array, *factors: Array) -> Array:
        found = lax.platform_dependent(x, rows, layer, cpu=_product_cpu, default=_product_default)
        return scaled(found, layer, factors)

    own = {
        "cpu": by_cpu if kernels.cpu.usable(rows.dtype) else None,
        "tpu": by_tpu if kernels.tpu.fits_product(x, rows) else None,
    }
    x, layer = x.astype(jnp.float32), jnp.asarray(layer, jnp.int32)
    return kernels.call(reference, x, rows, layer, *factors, **own)


def unpack(packed: Array) -> Array:
    """i8[..., d] in [−8, 7] for i8[..., d/2]: two to a byte, d/2 apart, the first in the low bits.

    So laid out, both halves come out whole and nothing has to be interleaved.
    """
    return jnp.concatenate([(packed << 4) >> 4, packed >> 4], axis=-1)


def quantize_blocks(rows: Array, block: int) -> tuple[Array, Array]:
    """Symmetric 4-bit rows, two numbers to a byte, with a scale for each block of columns.

    The greatest of a block is 7.5 steps, so that both ends are rounded by half a step. Scales are
    bfloat16: it has the range of float32, so that none overflows or vanishes, and the integers are
    chosen for the scale as it was rounded.

    Args:
      rows: [..., n, d], d a multiple of `block` and even.

    Returns:
      i8[..., n, d/2] (see `unpack`) and bf16[..., n, d/block]. The scale of a block that holds NaN
      or infinity is NaN or infinity, so that its products are NaN.
    """
    rows = rows.astype(jnp.float32)
    d = rows.shape[-1]
    blocks = rows.reshape(*rows.shape[:-1], d // block, block)
    scale = (jnp.abs(blocks).max(-1) / 7.5).astype(jnp.bfloat16)
    step = jnp.where(scale == 0, 1, scale).astype(jnp.float32)[..., None]
    integers = jnp.clip(jnp.round(blocks / step), -8, 7).astype(jnp.int8).reshape(rows.shape)
    return (integers[..., : d // 2] & 15) | (integers[..., d // 2 :] << 4), scale


def dequantize_blocks(packed: Array, scale: Array) -> Array:
    """f32[..., n, d] for what `quantize_blocks` returns; no product in it is rounded."""
    integers = unpack(packed)
    blocks = integers.reshape(*scale.shape, integers.shape[-1] // scale.shape[-1])
    wide = blocks.astype(jnp.float32) * scale.astype(jnp.float32)[..., None]
    return wide.reshape(integers.shape)


def round_blocks(x: Array, block: int) -> tuple[Array, Array]:
    """x: [tokens, d] in 8 bits, with a scale for each block of columns.

    Returns:
      i8[tokens, d] and f32[tokens, d/block]. The scale of a block that holds NaN or infinity is NaN
      or infinity, so that its products are NaN.
    """
    blocks = x.astype(jnp.float32).reshape(x.shape[0], -1, block)
    scale = jnp.abs(blocks).max(-1) / 127
    step = jnp.where(scale == 0, 1, scale)[..., None]
    return jnp.round(blocks / step).astype(jnp.int8).reshape(x.shape), scale


def rounded_blocks(x: Array, block: int) -> Array:
    """f32[tokens, d], what `round_blocks` makes of x; its derivative is that of x."""
    integers, scale = round_blocks(x, block)
    blocks = integers.reshape(*scale.shape, block).astype(jnp.float32) * scale[..., None]
    x = x.astype(jnp.float32)
    # So, and not as x and what it lacks, which would not be these numbers to the last bit.
    return lax.stop_gradient(blocks.reshape(x.shape)) + (x - lax.stop_gradient(x))


def block_product(x: Array, packed: Array, scale: Array, layer: Array | int) -> Array:
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
    d, block = x.shape[1], x.shape[1] // scale.shape[2]

    def by(kernel: Callable[..., Array], x: Array, *others: Array) -> Array:
        return kernel(*round_blocks(x, block), *others)

    def reference(x: Array, packed: Array, scale: Array, layer: Array) -> Array:
        forms = {"cpu": _block_product_cpu, "default": _block_product_default}
        return lax.platform_dependent(rounded_blocks(x, block), packed, scale, layer, **forms)

    cpu = functools.partial(by, kernels.cpu.block_product)
    tpu = functools.partial(by, kernels.tpu.block_product)
    own = {
        "cpu": cpu if kernels.cpu.fits_blocks(d, block) else None,
        "tpu": tpu if kernels.tpu.fits_blocks(x, packed, scale) else None,
    }
    layer = jnp.asarray(layer, jnp.int32)
    return kernels.call(reference, x, packed, scale, layer, **own)


def _block_product_default(x: Array, packed: Array, scale: Array, layer: Array) -> Array:
    here = (lax.dynamic_index_in_dim(array, layer, keepdims=False) for array in (packed, scale))
    return _times(x, dequantize_blocks(*here))


def _block_product_cpu(x: Array, packed: Array, scale: Array, layer: Array) -> Array:
    x, packed, scale = lax.optimization_barrier((x, packed, scale))

    def part(start: Array | int, step: int) -> Array:
        here = (
            lax.dynamic_slice(array, (layer, start, 0), (1, step, array.shape[2]))[0]
            for array in (packed, scale)
        )
        return dequantize_blocks(*here)

    return _in_chunks(x, packed.shape[1], part, (packed, scale, layer))


def _product_default(x: Array, rows: Array, layer: Array) -> Array:
    here = lax.dynamic_index_in_dim(rows, layer, keepdims=False)
    if rows.dtype in (jnp.int8, jnp.bfloat16):
        # int8 is exact in bfloat16, and both operands alike take the matrix unit. The rounding of
        # x (2⁻⁸ at most) is less than that of the rows.
        x, here = x.astype(jnp.bfloat16), here.astype(jnp.bfloat16)
    return _times(x, here)


def _product_cpu(x: Array, rows: Array, layer: Array) -> Array:
    tokens, n = x.shape[0], rows.shape[1]
    # Otherwise XLA repeats the computation of x, at least its cast, for every row; and if a loop
    # calls this with the same rows, it widens them ahead of the loop.
    x, rows = lax.optimization_barrier((x, rows))
    if _compat.cpu_fuses_widening and tokens <= _FUSED_TOKENS:
        here = lax.dynamic_index_in_dim(rows, layer, keepdims=False).astype(jnp.float32)
        # Vector times transposed matrix, and nothing else, is the form that XLA fuses.
        return jnp.stack([jnp.matmul(row, here.T, precision=_PRECISION) for row in x])

    def part(start: Array | int, step: int) -> Array:
        here = lax.dynamic_slice(rows, (layer, start, 0), (1, step, rows.shape[2]))[0]
        return here.astype(jnp.float32)

    return _in_chunks(x, n, part, (rows, layer))


def _in_chunks(
    x: Array, n: int, part: Callable[[Array | int, int], Array], sources: Sequence[Array]
) -> Array:
    """x @ rows.T: f32[tokens, n], where part(start, step) gives f32[step, d] of the n rows.

    Args:
      sources: the arrays that `part` reads.
    """
    tokens, d = x.shape
    chunks = -(-n // max(1, _CHUNK // d))
    step = -(-n // chunks)
    if chunks == 1:
        return _times(x, part(0, n))

    def body(i: Array, scores: Array) -> Array:
        # The last chunk begins early, so that it ends with the rows: some are computed twice.
        start = jnp.minimum(i * step, n - step)
        return lax.dynamic_update_slice(scores, _times(x, part(start, step)), (0, start))

    axes = _compat.varying_axes((x, *sources))
    empty = _compat.varying_over(jnp.zeros((tokens, n), jnp.float32), axes)
    return lax.fori_loop(0, chunks, body, empty)


def _times(x: Array, rows: Array) -> Array:
    return lax.dot_general(
        x,
        rows,
        (((1,), (1,)), ((), ())),
        precision=_PRECISION,
        preferred_element_type=jnp.float32,
    )


def fetch(rows: Array, layer: Array | int, chosen: Array) -> Array:
    """rows[layer, chosen]: [tokens, m, d] of rows: [L, n, d], for chosen: i32[tokens, m]."""
    layers, n, d = rows.shape
    # One flat index: slicing the layer first would copy it.
    flat = rows.reshape(layers * n, d)
    return flat.at[chosen + layer * n].get(mode="promise_in_bounds")


def where_they_are(stacked: Array, layer: Array, chosen: Array) -> tuple[Array, Array]:
    """What kernels fetch stacked[layer, chosen] by, for stacked: [L, G, ..., d].

    Returns:
      The rows of all layers' groups, [L · G, n, d], and which of them the chosen ones are.
    """
    layers, count, *_, d = stacked.shape
    return stacked.reshape(layers * count, -1, d), chosen + layer * count
