"""Rows in few bits: 8 with a scale for each row, 4 with a scale for each block of columns; and
rows whose narrow numbers lie in words."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

__all__ = [
    "dequantize_blocks",
    "pack",
    "pack_words",
    "quantize_blocks",
    "quantize_rows",
    "round_blocks",
    "rounded_blocks",
    "unpack",
    "unpack_words",
    "word_halves",
]


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


def pack(integers: Any) -> Any:
    """i8[..., d/2] of 4-bit integers i8[..., d], of JAX or NumPy; see `unpack`."""
    half = integers.shape[-1] // 2
    return (integers[..., :half] & 15) | (integers[..., half:] << 4)


def unpack(packed: Array) -> Array:
    """i8[..., d] in [−8, 7] for i8[..., d/2]: two to a byte, d/2 apart, the first in the low bits.

    So laid out, both halves come out whole and nothing has to be interleaved.
    """
    return jnp.concatenate([(packed << 4) >> 4, packed >> 4], axis=-1)


def pack_words(rows: Any) -> Any:
    """u32[..., d/2] of bf16[..., d], of JAX or NumPy: two numbers to a word, d/2 columns apart, the
    first in the low half.

    Examples:
      >>> words = pack_words(jnp.array([1.0, 2.0, 3.0, 4.0], jnp.bfloat16))
      >>> words.shape, unpack_words(words).tolist()
      ((2,), [1.0, 2.0, 3.0, 4.0])
    """
    if isinstance(rows, np.ndarray):
        bits: Any = rows.view(np.uint16).astype(np.uint32)
    else:
        bits = lax.bitcast_convert_type(rows, jnp.uint16).astype(jnp.uint32)
    half = rows.shape[-1] // 2
    return bits[..., :half] | (bits[..., half:] << 16)


def unpack_words(words: Array) -> Array:
    """f32[..., d], the numbers of u32[..., d/2] (see `pack_words`)."""
    return jnp.concatenate(word_halves(words), -1)


def word_halves(words: Array) -> list[Array]:
    """f32[..., d/2], the first columns of u32[..., d/2], and the others (see `pack_words`)."""
    halves = (words << 16, words & jnp.uint32(0xFFFF0000))
    return [lax.bitcast_convert_type(half, jnp.float32) for half in halves]


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
    return pack(integers), scale


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
    blocks = x.astype(jnp.float32).reshape(x.shape[0], x.shape[1] // block, block)
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
