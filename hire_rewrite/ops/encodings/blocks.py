"""Rows as integers of 8 or 4 bits, with a scale for each block of columns."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.ops.encodings.checks import (
    OR_NONE,
    check_block,
    check_columns,
    check_pairs,
    check_scale,
)
from hire_rewrite.ops.encodings.grids import Grid, Points
from hire_rewrite.ops.encodings.host import float32_of, pieces, sample
from hire_rewrite.ops.encodings.picked import picked_block_products, picked_block_sums
from hire_rewrite.ops.encodings.points import points
from hire_rewrite.ops.encodings.product import Matrix, block_product, block_products, widened
from hire_rewrite.ops.encodings.protocol import Stored, register_encoding
from hire_rewrite.ops.gather import gather_rows
from hire_rewrite.ops.predictors.protocol import Read, written
from hire_rewrite.ops.quantize import pack
from hire_rewrite.settings import check_settings

__all__ = ["Blocks"]


@register_encoding
@dataclasses.dataclass(frozen=True, repr=False)
class Blocks:
    """Integers with a scale for each block of columns: number = scale · integer (+ minimum).

    Args:
      bits: 8 (−128…127) or 4 (−8…7, with a minimum 0…15).
      block: how many columns share a scale, a divisor of the rows' length; None for the whole row.
      minimum: whether each block has a number that is added to its products, besides the scale.
      scale: the dtype of scales and minimums. In float16 a scale above 65504 becomes infinite, and
        one below 3·10⁻⁸ zero, as do the numbers of its block: give "bfloat16" for such weights.

    Raises:
      HireRewriteError: other bits, another dtype, or a block that is not a positive int.

    Examples:
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
        check_settings(self)
        if isinstance(self.bits, bool) or self.bits not in (4, 8):
            raise HireRewriteError(
                f"Blocks: bits={self.bits!r} is not supported: give bits=8 or bits=4"
            )
        check_scale("Blocks", self.scale)
        if not isinstance(self.minimum, bool):
            raise HireRewriteError(f"Blocks: minimum={self.minimum!r} must be True or False")
        if self.block is not None:
            check_block("Blocks", self.block, OR_NONE)

    def __repr__(self) -> str:
        return written(self)

    def check(self, n: int, d: int, *, site: str = "") -> None:
        """Raise HireRewriteError if blocks do not divide rows of length d, or 4 bits are odd."""
        check_columns("Blocks", d, self.block or d, site)
        if self.bits == 4:
            check_pairs("Blocks", d, site, "give bits=8")

    def store(self, rows: Array) -> Stored:
        """`integers`: i8[n, d] or i8[n, d/2], `scale` and, if asked for, `minimum`: [n, d/block].

        Integers are chosen for the scale and minimum as they were rounded. A block that holds NaN
        or infinity, or whose scale is too large for its dtype, gets such a scale.
        """
        n, d = rows.shape
        self.check(n, d)
        lowest, highest = self._grid.lowest, self._grid.highest
        block = self.block or d
        blocks = rows.astype(jnp.float32).reshape(n, d // block, block)
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
        """See `Encoding.store_exactly`; `ops.encodings.points` finds the scales.

        Raises:
          HireRewriteError: blocks do not divide the rows.
        """
        layers, n, d = rows.shape
        self.check(n, d)
        if self._points(sample(rows)) is None:
            return None
        parts: list[Stored] = []
        for some in pieces(rows):
            found = self._points(some)
            if found is None:
                return None
            parts.append(self._arranged(found, d))
        return {
            name: np.concatenate([part[name] for part in parts]).reshape(layers, n, -1)
            for name in parts[0]
        }

    def _points(self, rows: np.ndarray) -> Points | None:
        """Blocks that equal rows: [n, d], or None."""
        wide = float32_of(rows)
        if wide is None:
            return None
        return points(wide.reshape(-1, self.block or rows.shape[1]), self._grid)

    def _arranged(self, found: Points, d: int) -> Stored:
        """The arrays for blocks of rows of length d."""
        integers = found.integers.astype(np.int8).reshape(-1, d)
        stored = {"integers": self._packed(integers)}
        for name in ("scale", "minimum") if self.minimum else ("scale",):
            blocks = getattr(found, name).reshape(len(integers), -1)
            stored[name] = blocks.astype(jnp.dtype(self.scale))
        return stored

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
        settings: dict[str, Any] = {"bits": self.bits, "round_inputs": round_inputs}
        return block_product(x, *self._matrix(stored), layer, **settings)

    def products(
        self, x: Array, several: Sequence[Stored], layer: Array | int, *, round_inputs: bool = False
    ) -> Sequence[Array]:
        """f32[tokens, n] of each (see `JointEncoding.products`)."""
        if len(several) == 1:
            return [self.product(x, several[0], layer, round_inputs=round_inputs)]
        matrices = tuple(map(self._matrix, several))
        return block_products(x, matrices, layer, bits=self.bits, round_inputs=round_inputs)

    def picked_products(self, x: Array, stored: Stored, layer: Array | int, picked: Array) -> Array:
        """f32[tokens, k] (see `ops.encodings.picked`)."""
        return picked_block_products(x, self._matrix(stored), layer, picked, bits=self.bits)

    def picked_sums(
        self,
        ontos: Sequence[Array],
        h: Array,
        several: Sequence[Stored],
        layer: Array | int,
        picked: Array,
    ) -> tuple[Array, ...]:
        """f32[tokens, d] of each (see `ops.encodings.picked`)."""
        matrices = [self._matrix(stored) for stored in several]
        sums = picked_block_sums(ontos, h, matrices, layer, picked, bits=self.bits)
        return sums if isinstance(sums, tuple) else (sums,)

    def bytes(self, n: int, d: int) -> int:
        """The integers, and a scale and perhaps a minimum for each block."""
        numbers = (d // (self.block or d)) * (2 if self.minimum else 1)
        return n * (d * self.bits // 8 + numbers * jnp.dtype(self.scale).itemsize)

    def reads(self, n: int, d: int, tokens: int = 1) -> tuple[Read, ...]:
        """See `Encoding.reads`."""
        return (Read(f"scored_int{self.bits}", self.bytes(n, d), tokens),)

    @property
    def _grid(self) -> Grid:
        return Grid(self.bits, self.minimum, self.scale)

    def _packed(self, integers: Any) -> Any:
        """What is stored of integers i8[..., d], of NumPy or JAX."""
        return integers if self.bits == 8 else pack(integers)

    def _matrix(self, stored: Stored) -> Matrix:
        """Integers, scale, and minimum or None."""
        return stored["integers"], stored["scale"], stored["minimum"] if self.minimum else None

    def _arrays(self, stored: Stored) -> list[Any]:
        return [array for array in self._matrix(stored) if array is not None]
