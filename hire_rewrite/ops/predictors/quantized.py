"""HiRE-Q: the rows themselves, in few bits (arXiv 2402.09360).

Its errors have bounds (`ops.certify.quantized`), so that heads can prove what they return.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.ops.certify import quantized
from hire_rewrite.ops.gather import gather_rows, gathered_matmul
from hire_rewrite.ops.moments import Moments
from hire_rewrite.ops.narrow import block_matmul, matmul
from hire_rewrite.ops.predictors.protocol import Choose, Read, State, register_predictor, written
from hire_rewrite.ops.quantize import (
    dequantize_blocks,
    quantize_blocks,
    quantize_rows,
    rounded_blocks,
)
from hire_rewrite.settings import check_settings

_BLOCK = 32


@register_predictor
@dataclasses.dataclass(frozen=True, repr=False)
class Quantized:
    """Score with the rows rounded to `bits` bits.

    It needs no calibration. 8 bits, one scale for each row, are a quarter of float32 rows and half
    of bfloat16 ones, and err little whatever the activations: by at most ‖x‖₁ · (greatest |weight|
    of the row) / 254. 4 bits, one scale for each block of columns, are half of that with errors
    about ten times as large.

    Args:
      bits: 8 or 4.
      block: columns that share a scale, even and a divisor of the rows' length; 32 by default. For
        4 bits alone.

    Raises:
      HireRewriteError: another number of bits, or a block that is not even, or one for 8 bits.

    Examples:
      >>> import jax, jax.numpy as jnp, hire_rewrite as hire
      >>> rows = jax.random.normal(jax.random.key(0), (512, 64))
      >>> state = jax.tree.map(lambda array: array[None], hire.Quantized(8).fit(rows))  # one layer
      >>> hire.Quantized(8).score(state, rows[5:6], 0).argmax().item()
      5
    """

    bits: int = 8
    block: int | None = None

    def __post_init__(self) -> None:
        check_settings(self)
        if isinstance(self.bits, bool) or self.bits not in (4, 8):
            raise HireRewriteError(
                f"Quantized: bits={self.bits!r} is not supported: rows are stored in 8 or 4 bits, "
                "so give bits=8 or bits=4, or LowRank(rank) for a smaller predictor"
            )
        if self.block is None:
            return
        if self.bits == 8:
            raise HireRewriteError(
                f"Quantized: block={self.block!r} is for bits=4; rows of 8 bits have one scale "
                "each: leave it out"
            )
        if isinstance(self.block, bool) or not isinstance(self.block, int) or self.block < 2:
            raise HireRewriteError(
                f"Quantized: block={self.block!r} must be an even int of at least 2, or None for "
                f"{_BLOCK}"
            )
        if self.block % 2:
            raise HireRewriteError(
                f"Quantized: block={self.block} must be even: two numbers share a byte"
            )

    def __repr__(self) -> str:
        return written(self)

    @property
    def wants_calibration(self) -> bool:
        """False: the rounding of the rows does not depend on the activations."""
        return False

    @property
    def proportional(self) -> bool:
        """True."""
        return True

    @property
    def certifies(self) -> bool:
        """True."""
        return True

    def check(self, n: int, d: int, *, site: str = "", tokens: int | None = None) -> None:
        """Raise HireRewriteError if blocks do not divide rows of length d."""
        if self.bits == 4 and d % self._block:
            fitting = max((b for b in range(2, self._block, 2) if d % b == 0), default=None)
            remedy = "" if fitting is None else f"block={fitting}, or "
            raise HireRewriteError(
                f"{site + ': ' if site else ''}Quantized: block={self._block} does not divide the "
                f"rows' length {d}: give {remedy}bits=8"
            )

    def fit(self, rows: Array, moments: Moments | None = None, top: int | None = None) -> State:
        """`rows`: i8[n, d] and `scale`: f32[n], or i8[n, d/2] and bf16[n, d/block]."""
        self.check(*rows.shape)
        store = quantize_rows if self.bits == 8 else self._quantize_blocks
        integers, scale = store(rows)
        return {"rows": integers, "scale": scale}

    def score(
        self, state: State, x: Array, layer: Array | int, choose: Choose | None = None
    ) -> Array:
        """f32[tokens, n] for x: [tokens, d] (see `Predictor.score`)."""
        if self.bits == 4:
            return block_matmul(x, state["rows"], state["scale"], layer)
        return matmul(x, state["rows"], layer, state["scale"])

    def score_rows(self, state: State, x: Array, layer: Array | int, rows: Array) -> Array:
        """f32[tokens, m] for rows: i32[tokens, m] (see `ScoresRows`)."""
        rows_stored, scale, x = state["rows"], state["scale"], x.astype(jnp.float32)
        wide, default = jnp.dtype(jnp.float32), lax.Precision.DEFAULT
        if self.bits == 4:
            integers, scale = gather_rows(rows_stored, layer, rows), gather_rows(scale, layer, rows)
            return lax.dot_general(
                dequantize_blocks(integers, scale),
                rounded_blocks(x, self._block),
                (((2,), (1,)), ((0,), (0,))),
                precision=default,
            )
        settings = {"compute_dtype": wide, "out_dtype": wide, "precision": default}
        scores = gathered_matmul(x, rows_stored, layer, rows, **settings)
        return scores * gather_rows(scale, layer, rows)

    def bytes(self, n: int, d: int, dtype: Any, tokens: int = 1) -> int:
        """The integers and their scales."""
        if self.bits == 4:
            return n * (d // 2) + n * (d // self._block) * jnp.dtype(jnp.bfloat16).itemsize
        return n * d + n * jnp.dtype(jnp.float32).itemsize

    def reads(self, n: int, d: int, dtype: Any, tokens: int = 1) -> tuple[Read, ...]:
        """See `Timed`."""
        return (Read(f"scored_int{self.bits}", self.bytes(n, d, dtype), tokens),)

    def fit_bound(self, rows: Array, state: State) -> State:
        """`residual` and `norm`: f32[n] (see `ops.certify.quantized`)."""
        return quantized.fit_bound(rows, state["rows"], state["scale"])

    def bound(self, state: State, extra: State, x: Array, layer: Array | int) -> Array:
        """f32[tokens, n] (see `Certifying.bound`)."""
        return quantized.error_bound(x, extra, layer, self._block if self.bits == 4 else None)

    @property
    def _block(self) -> int:
        return self.block or _BLOCK

    def _quantize_blocks(self, rows: Array) -> tuple[Array, Array]:
        return quantize_blocks(rows, self._block)
