"""Rows as integers of 8 or 4 bits, with a scale for each block of columns."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.ops.encodings.product import block_product, widened
from hire_rewrite.ops.encodings.protocol import Stored, register_encoding
from hire_rewrite.ops.gather import gather_rows
from hire_rewrite.ops.predictors.protocol import Read, written

__all__ = ["Blocks"]

_SCALES = ("float16", "bfloat16", "float32")


@register_encoding
@dataclasses.dataclass(frozen=True, repr=False)
class Blocks:
    """Integers with a scale for each block of columns: number = scale · integer (+ minimum).

    Args:
      bits: 8 (−128…127) or 4 (−8…7, with a minimum 0…15).
      block: how many columns share a scale, a divisor of the rows' length; None for the whole row.
      minimum: whether each block has a number that is added to its products, besides the scale.
      scale: the dtype of scales and minimums. In float16 a scale above 65504 becomes infinite.

    Raises:
      HireRewriteError: other bits, another dtype, or a block that is not a positive int.

    Example:
      >>> import jax
      >>> rows = jax.random.normal(jax.random.key(0), (64, 96))
      >>> encoding = Blocks(4, 32)
      >>> stored = {name: array[None] for name, array in encoding.store(rows).items()}  # one layer
      >>> stored["integers"].shape, stored["scale"].shape
      ((1, 64, 48), (1, 64, 3))
      >>> encoding.product(rows[5:6], stored, 0).argmax().item()
      5
    """

    bits: int = 8
    block: int | None = 32
    minimum: bool = False
    scale: str = "float16"

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or self.bits not in (4, 8):
            raise HireRewriteError(
                f"Blocks: bits={self.bits!r} is not supported: give bits=8 or bits=4"
            )
        if self.scale not in _SCALES:
            raise HireRewriteError(
                f"Blocks: scale={self.scale!r} is not supported: give one of {', '.join(_SCALES)}"
            )
        if not isinstance(self.minimum, bool):
            raise HireRewriteError(f"Blocks: minimum={self.minimum!r} must be True or False")
        if self.block is None:
            return
        if isinstance(self.block, bool) or not isinstance(self.block, int) or self.block < 1:
            raise HireRewriteError(
                f"Blocks: block={self.block!r} must be a positive int, or None for the whole row"
            )

    def __repr__(self) -> str:
        return written(self)

    def check(self, n: int, d: int, *, site: str = "") -> None:
        """Raise HireRewriteError if blocks do not divide rows of length d, or 4 bits are odd."""
        prefix = f"{site + ': ' if site else ''}Blocks: "
        if self.block is not None and d % self.block:
            fitting = max(b for b in range(1, min(self.block, d) + 1) if d % b == 0)
            raise HireRewriteError(
                f"{prefix}block={self.block} does not divide the rows' length {d}: give "
                f"block={fitting}, or block=None for the whole row"
            )
        if self.bits == 4 and d % 2:
            raise HireRewriteError(
                f"{prefix}bits=4 stores two numbers to a byte, and the rows' length {d} is odd: "
                "give bits=8"
            )

    def store(self, rows: Array) -> Stored:
        """`integers`: i8[n, d] or i8[n, d/2], `scale` and, if asked for, `minimum`: [n, d/block].

        Integers are chosen for the scale and minimum as they were rounded. A block that holds NaN
        or infinity, or whose scale is too large for its dtype, gets such a scale.
        """
        n, d = rows.shape
        self.check(n, d)
        lowest, highest = self._range
        blocks = rows.astype(jnp.float32).reshape(n, -1, self.block or d)
        if self.minimum:
            least, greatest = blocks.min(-1), blocks.max(-1)
            # Halves, so that their difference does not overflow.
            scale = (greatest / 2 - least / 2) / ((highest - lowest) / 2)
            scale = scale.astype(self.scale)
            minimum = (least - lowest * scale.astype(jnp.float32)).astype(self.scale)
            rest = blocks - minimum.astype(jnp.float32)[..., None]
        else:
            # Both ends are rounded by half a step at 4 bits, and by nothing that counts at 8.
            scale = (jnp.abs(blocks).max(-1) / (127 if self.bits == 8 else 7.5)).astype(self.scale)
            rest = blocks
        step = scale.astype(jnp.float32)[..., None]
        integers = jnp.clip(jnp.round(rest / jnp.where(step == 0, 1, step)), lowest, highest)
        stored = {"integers": self._packed(integers.astype(jnp.int8).reshape(n, d)), "scale": scale}
        return stored | ({"minimum": minimum} if self.minimum else {})

    def store_exactly(self, rows: np.ndarray) -> Stored | None:
        """See `Encoding.store_exactly`."""
        raise NotImplementedError

    def decode(self, stored: Stored, layer: Array | int) -> Array:
        """f32[n, d] (see `Encoding.decode`)."""
        here = (lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in self._arrays(stored))
        return widened(*here, bits=self.bits)

    def decode_rows(self, stored: Stored, layer: Array | int, rows: Array) -> Array:
        """f32[*rows.shape, d] (see `Encoding.decode_rows`)."""
        here = (gather_rows(array, layer, rows) for array in self._arrays(stored))
        return widened(*here, bits=self.bits)

    def product(
        self, x: Array, stored: Stored, layer: Array | int, *, round_inputs: bool = False
    ) -> Array:
        """f32[tokens, n] for x: [tokens, d] (see `block_product`)."""
        integers, scale, *rest = self._arrays(stored)
        minimum = rest[0] if rest else None
        settings: dict[str, Any] = {"bits": self.bits, "round_inputs": round_inputs}
        return block_product(x, integers, scale, minimum, layer, **settings)

    def bytes(self, n: int, d: int) -> int:
        """The integers, and a scale and perhaps a minimum for each block."""
        numbers = (d // (self.block or d)) * (2 if self.minimum else 1)
        return n * (d * self.bits // 8 + numbers * jnp.dtype(self.scale).itemsize)

    def reads(self, n: int, d: int, tokens: int = 1) -> tuple[Read, ...]:
        """See `Encoding.reads`."""
        return (Read(f"scored_int{self.bits}", self.bytes(n, d), tokens),)

    @property
    def _range(self) -> tuple[int, int]:
        """The least and the greatest integer."""
        if self.bits == 8:
            return (-128, 127) if self.minimum else (-127, 127)
        return (0, 15) if self.minimum else (-8, 7)

    def _packed(self, integers: Any) -> Any:
        """What is stored of integers i8[..., d], of NumPy or JAX."""
        if self.bits == 8:
            return integers
        half = integers.shape[-1] // 2
        return (integers[..., :half] & 15) | (integers[..., half:] << 4)

    def _arrays(self, stored: Stored) -> list[Any]:
        names = ("integers", "scale", "minimum") if self.minimum else ("integers", "scale")
        return [stored[name] for name in names]
