"""8-bit rows of which half the bytes are 4-bit rows.

An integer is 16 · high + low, with both from −8 to 7. So the high half is the integer rounded to
the nearest multiple of 16, and with a scale 16 times as large a copy of the rows in 4 bits: what
guesses with few bytes and what is right with more are stored together.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from hire_rewrite.ops.encodings.blocks import Blocks
from hire_rewrite.ops.encodings.checks import check_block, check_columns, check_pairs
from hire_rewrite.ops.encodings.product import block_product
from hire_rewrite.ops.encodings.protocol import Stored, register_encoding
from hire_rewrite.ops.gather import gather_rows
from hire_rewrite.ops.predictors.protocol import Read
from hire_rewrite.ops.quantize import pack, unpack

__all__ = ["Nested"]

_LOWEST, _HIGHEST = -136, 119
"""16 · high + low at its least and at its greatest."""


@register_encoding
@dataclasses.dataclass(frozen=True)
class Nested:
    """8-bit rows in two halves, `high` and `low`, of which `high` is a copy in 4 bits.

    Args:
      block: how many columns share a scale, a divisor of the rows' length.

    Raises:
      HireRewriteError: the block is not a positive int.

    Examples:
      >>> import jax
      >>> rows, x = jax.random.normal(jax.random.key(0), (2, 64, 96))
      >>> encoding = Nested()
      >>> stored = {name: array[None] for name, array in encoding.store(rows).items()}  # one layer
      >>> fine, coarse = encoding.product(x, stored, 0), encoding.coarse(x, stored, 0)
      >>> (abs(fine - x @ rows.T).max() < 0.5).item(), (abs(coarse - x @ rows.T).max() < 5).item()
      (True, True)
    """

    block: int = 32

    def __post_init__(self) -> None:
        check_block("Nested", self.block)

    def check(self, n: int, d: int, *, site: str = "") -> None:
        """Raise HireRewriteError if blocks do not divide rows of length d, or d is odd."""
        check_columns("Nested", d, self.block, site)
        check_pairs("Nested", d, site, "give Blocks(8)")

    def store(self, rows: Array) -> Stored:
        """`high`, `low`: i8[n, d/2] (see `ops.quantize.unpack`) and `scale`: bf16[n, d/block].

        The scale of a block is negative where its greatest number is further from 0 than its
        least, because there is more room below 0 than above.
        """
        n, d = rows.shape
        self.check(n, d)
        blocks = rows.astype(jnp.float32).reshape(n, d // self.block, self.block)
        above, below = blocks.max(-1), -blocks.min(-1)
        further, nearer = jnp.maximum(above, below), jnp.minimum(above, below)
        scale = jnp.maximum(further / -_LOWEST, nearer / _HIGHEST)
        scale = jnp.where(above > below, -scale, scale).astype(jnp.bfloat16)
        step = jnp.where(scale == 0, 1, scale).astype(jnp.float32)[..., None]
        integers = jnp.clip(jnp.round(blocks / step), _LOWEST, _HIGHEST).astype(jnp.int16)
        return _halves(integers.reshape(n, d)) | {"scale": scale}

    def store_exactly(self, rows: np.ndarray) -> Stored | None:
        """See `Encoding.store_exactly`. A grid of which a block uses both ends is too wide."""
        self.check(*rows.shape[1:])
        stored = Blocks(8, self.block, scale="bfloat16").store_exactly(rows)
        if stored is None:
            return None
        integers, scale = stored["integers"].astype(np.int16), stored["scale"]
        blocks = integers.reshape(*scale.shape, self.block)
        turned = blocks.max(-1) > _HIGHEST
        blocks = np.where(turned[..., None], -blocks, blocks)
        if blocks.max(initial=0) > _HIGHEST:
            return None
        return _halves(blocks.reshape(rows.shape)) | {"scale": np.where(turned, -scale, scale)}

    def decode(self, stored: Stored, layer: Array | int) -> Array:
        """f32[n, d] (see `Encoding.decode`)."""
        names = ("high", "low", "scale")
        return _decoded(
            *(lax.dynamic_index_in_dim(stored[name], layer, keepdims=False) for name in names)
        )

    def decode_rows(self, stored: Stored, layer: Array | int, rows: Array) -> Array:
        """f32[*rows.shape, d] (see `Encoding.decode_rows`)."""
        names = ("high", "low", "scale")
        return _decoded(*(gather_rows(stored[name], layer, rows) for name in names))

    def product(
        self, x: Array, stored: Stored, layer: Array | int, *, round_inputs: bool = False
    ) -> Array:
        """f32[tokens, n] for x: [tokens, d], of all 8 bits (see `Encoding.product`)."""
        settings: dict[str, Any] = {"bits": 4, "round_inputs": round_inputs}
        rest = block_product(x, stored["low"], stored["scale"], None, layer, **settings)
        return self.coarse(x, stored, layer, round_inputs=round_inputs) + rest

    def coarse(
        self, x: Array, stored: Stored, layer: Array | int, *, round_inputs: bool = False
    ) -> Array:
        """f32[tokens, n] for x: [tokens, d], of the 4 bits in `high`, which alone is read.

        A number of it is off by at most 8 of the scale.
        """
        settings: dict[str, Any] = {"bits": 4, "round_inputs": round_inputs}
        return 16 * block_product(x, stored["high"], stored["scale"], None, layer, **settings)

    def bytes(self, n: int, d: int) -> int:
        """Both halves and the scales."""
        return n * d + n * (d // self.block) * jnp.dtype(jnp.bfloat16).itemsize

    def reads(self, n: int, d: int, tokens: int = 1) -> tuple[Read, ...]:
        """See `Encoding.reads`."""
        return (Read("scored_int4", self.bytes(n, d), tokens),)


def _halves(integers: Any) -> Stored:
    """`high` and `low` of integers i16[..., d], of JAX or NumPy."""
    high = (integers + 8) >> 4
    return {
        "high": pack(high.astype("int8")),
        "low": pack((integers - 16 * high).astype("int8")),
    }


def _decoded(high: Array, low: Array, scale: Array) -> Array:
    """f32[..., n, d] for i8[..., n, d/2] and bf16[..., n, d/block]."""
    integers = 16 * unpack(high).astype(jnp.float32) + unpack(low).astype(jnp.float32)
    blocks = integers.reshape(*scale.shape, integers.shape[-1] // scale.shape[-1])
    return (blocks * scale.astype(jnp.float32)[..., None]).reshape(integers.shape)
