"""How far a dense product may be from the exact one, in whatever order it adds.

`docs/certify.md` has the derivations.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from hire_rewrite.ops.certify import rounding

__all__ = ["DenseError", "dense_error"]


class DenseError(NamedTuple):
    """How far the dense product may be from x·w, where P and N are the sums of its positive and
    its negative terms: by `total` · (P + N) + `part` · 2^⌊log₂ m⌋ + `tiny`, with
    m = `reach` · max(P, N).

    No partial sum is greater than m, and the spacing of numbers does not grow between powers of 2.
    """

    total: Array
    part: Array
    reach: Array
    tiny: Array

    def of(self, positive: Array, negative: Array) -> Array:
        """An upper bound, given upper bounds of P and N."""
        greatest = rounding.at_least(self.reach * jnp.maximum(positive, negative))
        spacing = self.part * rounding.power_below(greatest)
        return rounding.at_least(self.total * (positive + negative) + spacing + self.tiny)

    def below(self, length: Array, norm: Array) -> Array:
        """An upper bound, given upper bounds of ‖x‖ and ‖w‖: P + N ≤ ‖x‖ ‖w‖."""
        factor = self.total + self.part * self.reach
        return rounding.at_least(factor * length * norm + self.tiny)


def dense_error(d: int, dtype: Any, precision: Any, length: Array, norm: Array) -> DenseError:
    """The error of a dense product of vectors of length d, on the platform that runs it.

    Args:
      dtype: of the operands; the wider one of two.
      length: f32[tokens, 1], no less than ‖x‖.
      norm: f32[1, n], no less than the norms of the rows.
    """
    operand = rounding.operand_unit(dtype, precision)

    def constants(unit: float, off: float) -> tuple[float, float, float]:
        grown = (1 + off) ** 2
        return grown - 1 + grown * unit, (d - 1) * unit, grown * (1 + rounding.gamma(d, unit))

    here = constants(rounding.CPU_UNIT, 0.0)
    elsewhere = constants(rounding.OTHER_UNIT, operand)
    total, part, reach = (rounding.platform(*both) for both in zip(here, elsewhere, strict=True))
    return DenseError(total, part, reach, rounding.flushed(d, length, norm))
