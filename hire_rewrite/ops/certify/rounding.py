"""What floating point may have done to a sum of products: bounds, themselves rounded up.

The standard model (Higham, *Accuracy and Stability of Numerical Algorithms*, 2nd ed., §2.2, 3.1):
every operation is off by a factor 1 + δ, |δ| ≤ u. A sum of d products in any order, fused or not,
is then off by at most γ_d Σ |x_j w_j|, with γ_d = d·u / (1 − d·u). All bounds here hold for every
order, because nothing is known about the order in which a compiler adds. Numbers below the normal
range may be flushed to zero at any time, which the standard model leaves out: `flushed` bounds it.

u is 2⁻²⁴ on CPU. Accelerators add in float32 too, but some of them cut off instead of rounding
(Fasi et al., *Numerical behavior of NVIDIA tensor cores*, 2021): 2⁻²² is supposed there.
`docs/certify.md` has the derivations.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from hire_rewrite import _compat
from hire_rewrite.errors import HireRewriteError

__all__ = [
    "BFLOAT16_UNIT",
    "CPU_UNIT",
    "OTHER_UNIT",
    "at_least",
    "check_product",
    "flushed",
    "gamma",
    "norms",
    "operand_unit",
    "platform",
    "power_below",
    "signed_sums",
]

CPU_UNIT, OTHER_UNIT = 2.0**-24, 2.0**-22
BFLOAT16_UNIT = 2.0**-8
"""The greatest relative error of rounding to bfloat16, to which other backends than CPU may round
the operands of a product (TF32 is finer)."""

_PRECISIONS = ("default", "bfloat16", "high", "tensorfloat32", "highest", "float32")
_TINY = 2.0**-126
_HUGE = 2.0**120
_TERMS = 8


def gamma(count: int, unit: float) -> float:
    """γ of `count` roundings; infinity if they are too many to say anything."""
    return count * unit / (1 - count * unit) if 2 * count * unit < 1 else float("inf")


def platform(cpu: float, other: float) -> Array:
    """f32[], one of two numbers, depending on where the program runs; rounded up."""
    return lax.platform_dependent(
        cpu=lambda: at_least(jnp.float32(cpu)), default=lambda: at_least(jnp.float32(other))
    )


def operand_unit(dtype: Any, precision: Any) -> float:
    """How much other backends than CPU may round the operands of a product, relatively."""
    precise = precision if isinstance(precision, tuple) else (precision,)
    exact = all(single == lax.Precision.HIGHEST for single in precise)
    return 0.0 if exact or jnp.dtype(dtype) == jnp.bfloat16 else BFLOAT16_UNIT


def check_product(compute_dtype: Any, out_dtype: Any, precision: Any) -> None:
    """Raise HireRewriteError if nothing is known about the rounding of such a product."""
    known = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))
    for dtype in (compute_dtype, out_dtype):
        if dtype is None or jnp.dtype(dtype) not in known:
            raise HireRewriteError(
                f"certify: a product of {compute_dtype} that returns {out_dtype} cannot be "
                "certified, only float32 and bfloat16 can: leave certify out, or cast the weight"
            )
    for single in precision if isinstance(precision, tuple) else (precision,):
        single = _compat.default_matmul_precision() if single is None else single
        if single is not None and str(single).lower() not in _PRECISIONS:
            raise HireRewriteError(
                f"certify: the rounding of precision={single} is not known: leave certify out, or "
                'give one of "default", "high" and "highest"'
            )


def at_least(bound: Array) -> Array:
    """An upper bound of what `bound` would be without rounding.

    For sums, products and roots of non-negative numbers in float32 with at most 100 roundings one
    after another. Near overflow infinity, so that nothing is concluded from it.
    """
    raised = bound * (1 + 2.0**-16) + 2 * _TINY
    return jnp.where(raised < _HUGE, raised, jnp.inf)


def power_below(numbers: Array) -> Array:
    """2^⌊log₂ v⌋ for positive f32[...]; infinity for infinity and NaN, 0 for what is below normal.

    Rounding v to nearest is off by at most u times this (Rump's unit in the first place).
    """
    bits = lax.bitcast_convert_type(numbers, jnp.int32) & jnp.int32(0x7F800000)
    return lax.bitcast_convert_type(bits, jnp.float32)


def norms(vectors: Array) -> Array:
    """Upper bounds of Euclidean norms, f32[...] for vectors: [..., d]; infinity if not finite."""
    vectors, d = vectors.astype(jnp.float32), vectors.shape[-1]
    # Squares of numbers near the greatest neither overflow nor, where they count, underflow.
    # Compilers like to multiply by reciprocals: that of a power of 2 is exact, within 2^±100.
    greatest = jnp.abs(vectors).max(-1, keepdims=True)
    unit = jnp.clip(power_below(greatest), 2.0**-100, 2.0**100)
    root = jnp.sqrt(jnp.square(vectors / unit).sum(-1)) * unit[..., 0]
    bound = at_least(root * (1 + gamma(d + 2, CPU_UNIT * 4)) + d * _TINY)
    return jnp.where(jnp.isfinite(vectors).all(-1), bound, jnp.inf)


def flushed(d: int, *sizes: Array) -> Array:
    """Bounds what is lost in a product of vectors of length d where tiny numbers become zero.

    Args:
      sizes: bounds of the norms of the vectors (quantized numbers up to 2⁷ beside them).
    """
    return 2.0**8 * d * _TINY * (1.0 + sum(sizes, jnp.float32(0.0)))


def signed_sums(products: Array) -> tuple[Array, Array, int]:
    """The sums of the positive and of the negative numbers, with few roundings one after another.

    Args:
      products: f32[..., d].

    Returns:
      P and N: f32[...], both non-negative, and how many roundings a term goes through at most. The
      sum is P − N; no partial sum, in whatever order, is greater than max(P, N).
    """
    d = products.shape[-1]
    sums = [jnp.maximum(products, 0.0), jnp.maximum(-products, 0.0)]
    roundings = 0
    while d > 1:
        rows = min(d, _TERMS)
        columns = -(-d // rows)
        padding = [(0, 0)] * (products.ndim - 1) + [(0, rows * columns - d)]
        for i, terms in enumerate(sums):
            terms = jnp.pad(terms, padding).reshape(*products.shape[:-1], rows, columns)
            # The barrier keeps the compiler from making one long sum of the short ones.
            sums[i] = lax.optimization_barrier(terms.sum(-2))
        roundings += rows - 1
        d = columns
    positive, negative = (terms[..., 0] for terms in sums)
    return positive, negative, roundings
