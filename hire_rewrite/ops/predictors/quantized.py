"""HiRE-Q: the rows themselves, in few bits (arXiv 2402.09360; there 4 bits, here 8 so far)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.ops.moments import Moments
from hire_rewrite.ops.predictors.protocol import State
from hire_rewrite.ops.products import product, quantize_rows


@dataclasses.dataclass(frozen=True)
class Quantized:
    """Score with the rows rounded to `bits` bits, one scale for each row.

    It reads a quarter of float32 rows and half of bfloat16 ones, needs no calibration, and errs
    little whatever the activations: by at most ‖x‖₁ · (greatest |weight| of the row) / 254.

    Args:
      bits: 8.

    Raises:
      HireRewriteError: another number of bits.
    """

    bits: int = 8

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or self.bits != 8:
            raise HireRewriteError(
                f"Quantized: bits={self.bits!r} is not supported: rows are stored in 8 bits, so "
                "give bits=8, or LowRank(rank) for a smaller predictor"
            )

    @property
    def wants_calibration(self) -> bool:
        """False: the rounding of the rows does not depend on the activations."""
        return False

    def check(self, n: int, d: int, *, site: str = "") -> None:
        """Nothing to check: rows of every size can be rounded."""

    def fit(self, rows: Array, moments: Moments | None = None) -> State:
        """`rows`: i8[n, d], `scale`: f32[n]."""
        integers, scale = quantize_rows(rows)
        return {"rows": integers, "scale": scale}

    def score(self, state: State, x: Array, layer: Array | int) -> Array:
        """f32[tokens, n] for x: [tokens, d] (see `Predictor.score`)."""
        scale = lax.dynamic_index_in_dim(state["scale"], layer, keepdims=False)
        return product(x, state["rows"], layer) * scale

    def bytes(self, n: int, d: int, dtype: Any) -> int:
        """The integers and their scales."""
        return n * d + n * jnp.dtype(jnp.float32).itemsize
