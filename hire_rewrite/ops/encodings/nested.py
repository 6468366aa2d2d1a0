"""8-bit rows of which half the bytes are 4-bit rows.

An integer from −128 to 127 is 16 · high + low − 128, with both from 0 to 15. The high half alone
says within which 16 integers it is: with 16 · high − 120, their middle, it is a copy of the rows in
4 bits. What guesses with few bytes and what is right with more are stored together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from hire_rewrite.ops.certify import quantized
from hire_rewrite.ops.encodings.blocks import Blocks
from hire_rewrite.ops.encodings.checks import (
    OR_NONE,
    check_block,
    check_columns,
    check_pairs,
    check_scale,
)
from hire_rewrite.ops.encodings.picked import picked_block_products, picked_block_sums
from hire_rewrite.ops.encodings.product import (
    Matrix,
    block_product,
    block_products,
    input_block,
    unpack_unsigned,
    widened,
)
from hire_rewrite.ops.encodings.protocol import Stored, register_encoding
from hire_rewrite.ops.gather import gather_rows
from hire_rewrite.ops.predictors.protocol import Read, State, written
from hire_rewrite.ops.quantize import pack
from hire_rewrite.settings import check_settings

__all__ = ["Nested"]

_MIDDLE, _LOWEST = -7.5, -8.0
"""What is added to a high half, in units of 16, and to a low one: together −128."""


@register_encoding
@dataclasses.dataclass(frozen=True, repr=False)
class Nested:
    """8-bit rows in two halves, `high` and `low`, of which `high` is a copy in 4 bits.

    The numbers are those of `Blocks(8, block, scale=scale)`.

    Args:
      block: how many columns share a scale, a divisor of the rows' length; None for the whole row.
      scale: the dtype of scales, float16, bfloat16 or float32.

    Raises:
      HireRewriteError: the block is not a positive int, or another dtype.

    Examples:
      >>> import jax
      >>> rows, x = jax.random.normal(jax.random.key(0), (2, 64, 96))
      >>> encoding = Nested()
      >>> stored = {name: array[None] for name, array in encoding.store(rows).items()}  # one layer
      >>> fine, coarse = encoding.product(x, stored, 0), encoding.coarse(x, stored, 0)
      >>> (abs(fine - x @ rows.T).max() < 0.5).item(), (abs(coarse - x @ rows.T).max() < 5).item()
      (True, True)
    """

    block: int | None = 32
    scale: str = "float16"

    def __post_init__(self) -> None:
        check_settings(self)
        check_scale("Nested", self.scale)
        if self.block is not None:
            check_block("Nested", self.block, OR_NONE)

    def __repr__(self) -> str:
        return written(self)

    def check(self, n: int, d: int, *, site: str = "") -> None:
        """Raise HireRewriteError if blocks do not divide rows of length d, or d is odd."""
        check_columns("Nested", d, self.block or d, site)
        check_pairs("Nested", d, site, "give Blocks(8)")

    def store(self, rows: Array) -> Stored:
        """`high`, `low`: i8[n, d/2], two numbers to a byte, d/2 apart, the first in the low bits;
        and `scale`: [n, d/block]."""
        self.check(*rows.shape)
        return _halved(self._whole.store(rows))

    def store_exactly(self, rows: np.ndarray) -> Stored | None:
        """See `Encoding.store_exactly`: where `Blocks(8, block, scale=scale)` does."""
        self.check(*rows.shape[1:])
        stored = self._whole.store_exactly(rows)
        return None if stored is None else _halved(stored)

    def decode(self, stored: Stored, layer: Array | int) -> Array:
        """f32[n, d] (see `Encoding.decode`)."""
        here = (lax.dynamic_index_in_dim(stored[n], layer, keepdims=False) for n in _NAMES)
        return _decoded(*here)

    def decode_rows(self, stored: Stored, layer: Array | int, rows: Array) -> Array:
        """f32[*rows.shape, d] (see `Encoding.decode_rows`)."""
        return _decoded(*(gather_rows(stored[name], layer, rows) for name in _NAMES))

    def product(
        self, x: Array, stored: Stored, layer: Array | int, *, round_inputs: bool = False
    ) -> Array:
        """f32[tokens, n] for x: [tokens, d], of all 8 bits (see `Encoding.product`)."""
        settings: dict[str, Any] = {"bits": 4, "round_inputs": round_inputs}
        high, low = block_products(x, _matrices(stored), layer, **settings)
        return 16 * high + low

    def coarse(
        self, x: Array, stored: Stored, layer: Array | int, *, round_inputs: bool = False
    ) -> Array:
        """f32[tokens, n] for x: [tokens, d], of the 4 bits in `high`, which alone is read.

        A number of it is off by at most 8 of the scale.
        """
        settings: dict[str, Any] = {"bits": 4, "round_inputs": round_inputs}
        return 16 * block_product(x, *_matrices(stored)[0], layer, **settings)

    def picked_products(self, x: Array, stored: Stored, layer: Array | int, picked: Array) -> Array:
        """f32[tokens, k] (see `ops.encodings.picked`)."""
        high, low = _matrices(stored)
        fine = picked_block_products(x, low, layer, picked, bits=4)
        return 16 * picked_block_products(x, high, layer, picked, bits=4) + fine

    def picked_sums(
        self,
        ontos: Sequence[Array],
        h: Array,
        several: Sequence[Stored],
        layer: Array | int,
        picked: Array,
    ) -> tuple[Array, ...]:
        """f32[tokens, d] of each (see `ops.encodings.picked`)."""
        sums: Any = tuple(ontos)
        for half, factor in enumerate((16, 1)):
            matrices = [_matrices(stored)[half] for stored in several]
            sums = picked_block_sums(sums, factor * h, matrices, layer, picked, bits=4)
            sums = sums if isinstance(sums, tuple) else (sums,)
        return sums

    def bytes(self, n: int, d: int) -> int:
        """Both halves and the scales."""
        return self._whole.bytes(n, d)

    def reads(self, n: int, d: int, tokens: int = 1) -> tuple[Read, ...]:
        """See `Encoding.reads`."""
        return (Read("scored_int4", self.bytes(n, d), tokens),)

    def coarse_reads(self, n: int, d: int, tokens: int = 1) -> tuple[Read, ...]:
        """See `CoarseEncoding.coarse_reads`: the high halves and the scales."""
        return (Read("scored_int4", self.bytes(n, d) - n * (d // 2), tokens),)

    def fit_coarse_bound(self, rows: Array, stored: Stored) -> State:
        """`residual`, `norm` and `terms`: f32[n] (see `ops.certify.quantized`)."""
        scale, d = stored["scale"], rows.shape[-1]
        middle = 16 * widened(stored["high"], scale, _MIDDLE, bits=4)
        # What is added up are integers to 15, and apart from them what makes these their middles.
        block = jnp.full(d // scale.shape[-1], 16 * (15 - _MIDDLE), jnp.float32)
        terms = jnp.abs(scale.astype(jnp.float32))[..., None] * block
        return quantized.bound_of(rows, middle, terms.reshape(middle.shape))

    def coarse_bound(self, stored: Stored, extra: State, x: Array, layer: Array | int) -> Array:
        """f32[tokens, n] (see `BoundedEncoding.coarse_bound`)."""
        return quantized.error_bound(x, extra, layer, input_block(x, stored["scale"]))

    @property
    def _whole(self) -> Blocks:
        """The encoding of the same numbers in one piece."""
        return Blocks(8, self.block, scale=self.scale)


_NAMES = ("high", "low", "scale")


def _halved(stored: Stored) -> Stored:
    """`high` and `low` in place of integers i8[..., d], of JAX or NumPy."""
    integers = stored["integers"]
    halves = {"high": pack((integers >> 4) + 8), "low": pack(integers & 15)}
    return halves | {"scale": stored["scale"]}


def _matrices(stored: Stored) -> tuple[Matrix, Matrix]:
    """Both halves; the first in units of 16."""
    high, low, scale = (stored[name] for name in _NAMES)
    return (high, scale, _MIDDLE), (low, scale, _LOWEST)


def _decoded(high: Array, low: Array, scale: Array) -> Array:
    """f32[..., n, d] for i8[..., n, d/2] and [..., n, d/block]."""
    highs, lows = (unpack_unsigned(half).astype(jnp.int16) for half in (high, low))
    return widened(16 * highs + lows - 128, scale, bits=8)
