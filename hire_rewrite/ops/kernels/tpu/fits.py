"""Which operands the kernels for TPU take."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

__all__ = [
    "CHUNK",
    "LANES",
    "TILE",
    "fits_blocks",
    "fits_groups",
    "fits_matmul",
    "fits_picked",
    "fits_single",
    "span_of",
]

LANES = 128
"""Columns in a tile. Rows of another length XLA may store column by column; a kernel wants them row
by row, so that the whole weight would be copied for it."""

TILE = 8
"""Rows that lie together in a tile; fewer cannot be copied (of bfloat16, which lies in pairs)."""

CHUNK = 1 << 21
"""Bytes of rows in a chunk that is fetched, at most; two of them are in VMEM."""

_PARTS = 1 << 21
"""Bytes that x may take in `block_product`, of a span a copy for each block."""

_SPAN = 512
"""Columns that are multiplied at once, at least."""

_VMEM = 128 << 20
"""Bytes, the most that a TPU has: XLA never brings a larger array there."""

_LISTED = 1 << 16
"""Numbers of rows, which are in scalar memory, at most."""

_SCORED, _FETCHED = 16, 32
"""Tokens. More are a matrix product, and no longer bound by the rows."""


def fits_matmul(x: Array, rows: Array, *_: Any) -> bool:
    """Whether `matmul` takes them: narrow rows, few tokens."""
    narrow = rows.dtype in (jnp.int8, jnp.bfloat16)
    return narrow and rows.shape[2] % LANES == 0 and _few(x, _SCORED)


def fits_blocks(x: Array, integers: Array, scale: Array, *_: Any, bits: int = 4) -> bool:
    """Whether `block_product` takes them: rows or their halves in whole blocks, few tokens."""
    width, blocks = integers.shape[2], scale.shape[2]
    even = bits == 8 or blocks == 1 or blocks % 2 == 0
    if width % LANES or not even or not _few(x, _SCORED):
        return False
    return blocks * x.shape[0] * span_of(width, x.shape[1] // blocks) * 2 <= _PARTS


def span_of(width: int, block: int) -> int:
    """Columns that are multiplied at once: whole blocks, of which each takes tokens' places."""
    spans = (n for n in range(_SPAN, width, LANES) if n % block == 0 and width % n == 0)
    return next(spans, width)


def fits_groups(x: Array, stacked: Array, *_: Any, **__: Any) -> bool:
    """Whether `gathered_matmul` and `gathered_sum` take groups for all tokens.

    Args:
      x: what they are multiplied with, [tokens, ...].
      stacked: [..., m, d], m of them in a group or a part of it.
    """
    m, d = stacked.shape[-2:]
    return m % TILE == 0 and m * d * stacked.dtype.itemsize <= CHUNK and _narrow(x, stacked)


def fits_single(x: Array, stacked: Array, index: Array) -> bool:
    """Whether `gathered_matmul` takes single rows of each token, and reads less than XLA would.

    It reads the tile around each row; XLA's gather reads the row alone, or, if the weight fits into
    VMEM, perhaps the whole weight.

    Args:
      x: [tokens, d].
      stacked: [..., n, d].
      index: i32[tokens, m].
    """
    tiles = stacked.size // stacked.shape[-1] // TILE
    small = stacked.size * stacked.dtype.itemsize <= _VMEM
    tiled = stacked.shape[-2] % TILE == 0
    return tiled and small and _narrow(x, stacked) and 0 < index.size < tiles


def fits_picked(x: Array, stacked: Array, picked: Array) -> bool:
    """Whether `picked_products` and `picked_sum` take rows: those that a copy takes alone.

    Args:
      x: what they are multiplied with, [tokens, ...].
      stacked: [L, n, d] in float32, or u32[L, n, d/2] in words.
      picked: i32[tokens, k].
    """
    words = stacked.dtype in (jnp.float32, jnp.uint32) and stacked.shape[-1] % LANES == 0
    return words and _few(x, _FETCHED) and 0 < picked.size <= _LISTED


def _narrow(x: Array, stacked: Array) -> bool:
    narrow = x.dtype == stacked.dtype == jnp.bfloat16
    return narrow and stacked.shape[-1] % LANES == 0 and _few(x, _FETCHED)


def _few(x: Array, most: int) -> bool:
    """Whether x has at most so many tokens; where their number is a symbol, nobody knows."""
    return isinstance(x.shape[0], int) and 0 < x.shape[0] <= most
