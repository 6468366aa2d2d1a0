"""How wrong the scores of quantized rows can be.

With w = ŵ + r, where ŵ is what is stored, x·w differs from x·ŵ by at most ‖x‖ ‖r‖ (Cauchy and
Schwarz), and what is computed for x·ŵ differs from it by roundings (in 4 bits also of x, to 8
bits). `docs/certify.md` has the rest.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from hire_rewrite.ops.certify import rounding
from hire_rewrite.ops.quantize import dequantize_blocks, rounded_blocks

__all__ = ["bound_of", "error_bound", "fit_bound"]


def fit_bound(rows: Array, integers: Array, scale: Array) -> dict[str, Array]:
    """`residual`: f32[n], no less than ‖r‖, and `norm`: f32[n], no less than ‖w‖.

    Args:
      rows: [n, d].
      integers, scale: what `quantize_rows` or `quantize_blocks` stored for them.
    """
    if scale.ndim == 2:
        stored = dequantize_blocks(integers, scale)
    else:
        stored = integers.astype(jnp.float32) * scale[:, None]
    return bound_of(rows, stored)


def bound_of(rows: Array, stored: Array, terms: Array | None = None) -> dict[str, Array]:
    """`residual` and `norm` as in `fit_bound`, and with `terms` the norms of these.

    Args:
      rows: [n, d].
      stored: f32[n, d], ŵ, whose numbers are off by a factor 1 ± u at most.
      terms: f32[n, d], not less than the sums of the sizes of the numbers that are added up in
        place of those of ŵ, if it is not added up itself.
    """
    exact = rows.astype(jnp.float32)
    norm, residual = rounding.norms(exact), rounding.norms(exact - stored)
    # The product and the difference above were rounded: by at most u (2 ‖ŵ‖ + ‖r‖).
    slack = 4 * rounding.OTHER_UNIT * (norm + residual)
    bound = {"residual": rounding.at_least(residual + slack), "norm": norm}
    return bound if terms is None else bound | {"terms": rounding.norms(terms)}


def error_bound(x: Array, bound: dict[str, Array], layer: Array | int, block: int | None) -> Array:
    """f32[tokens, n], no less than |x · row − score|; infinity where that is not known.

    Args:
      x: [tokens, d].
      bound: what `fit_bound` returned for each layer, stacked.
      block: columns that share a scale, of rows in 4 bits; None for rows in 8 bits.
    """
    residual, norm = (lax.dynamic_index_in_dim(bound[name], layer) for name in ("residual", "norm"))
    d, length, stored = x.shape[1], rounding.norms(x)[:, None], norm + residual
    terms = lax.dynamic_index_in_dim(bound["terms"], layer) if "terms" in bound else stored
    # Other backends than CPU may multiply rounded vectors and, in 4 bits, rounded rows.
    unit = rounding.operand_unit(x.dtype, None)
    off = rounding.platform(0.0, unit)
    rows_off = rounding.platform(0.0, rounding.BFLOAT16_UNIT if block else 0.0)
    sums = rounding.platform(
        *(rounding.gamma(d + 3, unit) for unit in (rounding.CPU_UNIT, rounding.OTHER_UNIT))
    )
    # (1 + off) (1 + rows_off) (1 + sums) - 1, without the cancellation.
    wrong = off + (1 + off) * (rows_off + (1 + rows_off) * sums)
    tiny = rounding.flushed(d, length, terms)
    total = length * residual + wrong * length * terms + tiny
    if block:  # what is multiplied is x̂
        moved = rounding.norms(x.astype(jnp.float32) - rounded_blocks(x, block))[:, None]
        total += (moved + 4 * rounding.OTHER_UNIT * length) * (stored + wrong * terms)
    return rounding.at_least(total)
