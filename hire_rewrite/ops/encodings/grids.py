"""Grids: the numbers that integers with a scale, and perhaps a minimum, can make.

Two kinds of points are left out, because not all platforms decode them alike. Compilers may compute
scale · integer + minimum with one rounding or with two, so a float32 scale beside a minimum must be
short enough for its product to need none. And they may take numbers below 2⁻¹²⁶ for zero.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

__all__ = ["Grid", "Points"]

_TINY = float(np.finfo(np.float32).tiny)
"""The least scale. Beside a minimum it is 2²⁴ times that, and for both: no sum is below it."""


class Grid(NamedTuple):
    """The numbers that a block can hold.

    Attributes:
      bits: 8 or 4.
      minimum: whether a minimum is added.
      scale: the dtype of scale and minimum.
    """

    bits: int
    minimum: bool
    scale: str

    @property
    def lowest(self) -> int:
        """The least integer."""
        return 0 if self.bits == 4 and self.minimum else -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        """The greatest integer."""
        return self.lowest + (1 << self.bits) - 1

    def rounded(self, numbers: np.ndarray) -> np.ndarray:
        """f32, the nearest numbers of the scale's dtype."""
        return numbers.astype(jnp.dtype(self.scale)).astype(np.float32)

    def rounded_scale(self, numbers: np.ndarray, digits: int = 24) -> np.ndarray:
        """f32, the nearest scales; beside a minimum their products with integers are exact.

        Args:
          digits: of at most so many binary digits, if they are float32 beside a minimum.
        """
        scale = self.rounded(numbers)
        if self.scale != "float32" or not self.minimum:
            return scale
        kept = min(digits, 20 if self.bits == 4 else 17)  # 15 has 4 digits, 127 has 7
        dropped = np.uint32(24 - kept)
        half = np.uint32(1) << (dropped - np.uint32(1))
        return ((scale.view(np.uint32) + half) >> dropped << dropped).view(np.float32)


class Points(NamedTuple):
    """Blocks of numbers on a grid: scale · integers + minimum.

    Attributes:
      integers: f32[m, B].
      scale: f32[m].
      minimum: f32[m]; zeros for a grid without.
      exact: bool[m], whether the numbers of a block are those asked for.
    """

    integers: np.ndarray
    scale: np.ndarray
    minimum: np.ndarray
    exact: np.ndarray

    @classmethod
    def nearest(
        cls, blocks: np.ndarray, scale: np.ndarray, minimum: np.ndarray, grid: Grid
    ) -> Points:
        """Those of a grid with scale and minimum f32[m] that are nearest to blocks: f32[m, B]."""
        inverse = np.where(scale == 0, np.float32(0), 1 / scale)[:, None]
        integers = blocks - minimum[:, None] if grid.minimum else blocks.copy()
        np.multiply(integers, inverse, out=integers)
        np.rint(integers, out=integers)
        np.clip(integers, grid.lowest, grid.highest, out=integers)
        numbers = integers * scale[:, None]
        if grid.minimum:
            numbers += minimum[:, None]
        least = _TINY * 2.0**24 if grid.minimum else _TINY
        sound = _none_below(scale, least) & _none_below(minimum, least)
        return cls(integers, scale, minimum, (numbers == blocks).all(1) & sound)

    @classmethod
    def none(cls, blocks: np.ndarray) -> Points:
        """Points of which no block is exact, to be overwritten."""
        m = len(blocks)
        zeros = np.zeros((2, m), np.float32)
        return cls(np.empty_like(blocks), zeros[0], zeros[1], np.zeros(m, bool))

    def overwrite(self, places: np.ndarray, some: Points) -> None:
        """Put other points in the place of some: bool[m] or their numbers."""
        for array, other in zip(self, some, strict=True):
            array[places] = other


def _none_below(numbers: np.ndarray, least: float) -> np.ndarray:
    """bool[m], whether numbers are zero or at least so large."""
    return (numbers == 0) | (np.abs(numbers) >= least)
