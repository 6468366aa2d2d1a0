"""HiRE-LR: a product of two thin matrices (arXiv 2402.09360), fitted to the activations.

Wanted are U: [n, r] and Q: [r, d] that minimize E‖W(x − μ) − U Q (x − μ)‖² over the activations
x, whose mean is μ and whose covariance is C. Substitute x = μ + S z with S = C^½, so that z is
white, E z zᵀ = I. The expectation is then ‖(W − U Q) S‖² in the Frobenius norm, and by Eckart and
Young the best U Q S is W S cut to its r greatest singular values. With the eigenvectors V and
eigenvalues Λ of S WᵀW S (only [d, d], whatever n is),

    U = W S V_r      Q = V_rᵀ S⁻¹ = Λ_r⁻¹ V_rᵀ S WᵀW      scores = U (Q x) + W μ − U Q μ.

The second form of Q needs no inverse of S. Without activations C = I and μ = 0, which is the plain
singular value decomposition of W.

U is the part that is read most, and 8 bits a number suffice for it: rounding adds about 1 % to an
error of 30 to 50 % that the cut to rank r leaves. Any diagonal matrix may move from U to Q;
Λ^¼ in both makes the rounding of rows with one scale each cost least.

Measured on the vocabulary head of SmolLM2-135M (V = 49,152, d = 576), 16 K tokens of one kind of
text for the fit: the most probable token and the 64 most probable among 256 candidates, on
unseen text of that kind and of two others.

    rank, stored as   same kind       code            table
    192, float32      0.999  0.976    0.997  0.932    0.992  0.890
    192, int8         0.999  0.976    0.997  0.931    0.991  0.889
    144, int8         0.997  0.959    0.988  0.893    0.974  0.847
    192, plain SVD    0.269  0.210    0.339  0.209    0.571  0.326
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.ops.moments import Moments
from hire_rewrite.ops.predictors.protocol import State
from hire_rewrite.ops.products import product, quantize_rows

_SHRINKAGE = 1e-3
"""The part of the covariance that is replaced by the mean square of x in all directions alike.

Directions that the calibration did not show, all but a few when it has fewer tokens than d, are
then rare instead of impossible. Between 0.01 % and 1 % recall was the best and hardly changed, from
128 to 16 K tokens at d = 576; 5 % and more, and also the shrinkage that is optimal for normally
distributed tokens (Chen et al. 2010), lost recall on other kinds of text."""

_NEGLIGIBLE = 1e-7
"""Eigenvalues below this part of the greatest are rounding errors of float32."""


@dataclasses.dataclass(frozen=True)
class LowRank:
    """Score with a product of two thin matrices.

    Fitted to activations (calibration) it recalls well at a quarter of the rows' length; without,
    it is hardly of use.

    Args:
      rank: None for a quarter of d, rounded up to a multiple of 16, at most d and n.

    Raises:
      HireRewriteError: the rank is no positive int.
    """

    rank: int | None = None

    def __post_init__(self) -> None:
        if self.rank is None:
            return
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise HireRewriteError(
                f"LowRank: rank={self.rank!r} must be a positive int, or None for a quarter of the "
                "rows' length"
            )

    @property
    def wants_calibration(self) -> bool:
        """True: see the figures above."""
        return True

    def check(self, n: int, d: int, *, site: str = "") -> None:
        """Raise HireRewriteError if n rows of length d have no such rank."""
        if self.rank is not None and self.rank > min(n, d):
            raise HireRewriteError(
                f"{site + ': ' if site else ''}LowRank: rank={self.rank} is more than a "
                f"{n} × {d} matrix can have: give at most {min(n, d)}, or None for "
                f"{self._rank(n, d)}"
            )

    def fit(self, rows: Array, moments: Moments | None = None) -> State:
        """Fit to rows: [n, d] and, if given, the moments of the vectors that are to be scored.

        Returns:
          `up`: i8[n, r] and its `scale`: f32[n] (U), `down`: f32[r, d] (Q), `offset`: f32[n].
        """
        n, d = rows.shape
        self.check(n, d)
        rank = self._rank(n, d)
        w = rows.astype(jnp.float32)
        with jax.default_matmul_precision("highest"):
            gram = w.T @ w
            mean, root = jnp.zeros(d), None
            if moments is not None:
                mean, covariance = moments.mean_and_covariance()
                root = _square_root(_shrunk(mean, covariance))
                gram_root = gram @ root
                values, vectors = jnp.linalg.eigh(root @ gram_root)
            else:
                gram_root = gram
                values, vectors = jnp.linalg.eigh(gram)
            # Ascending, so the last are the greatest.
            values, vectors = values[-rank:], vectors[:, -rank:]
            sound = values > _NEGLIGIBLE * values[-1]
            quarter = jnp.where(sound, values, 1.0) ** 0.25 * sound
            inverse = jnp.where(sound, 1.0 / jnp.where(sound, quarter, 1.0), 0.0)
            directions = vectors if root is None else root @ vectors
            up = w @ (directions * inverse)
            down = (inverse**3)[:, None] * (gram_root @ vectors).T
            integers, scale = quantize_rows(up)
            offset = w @ mean - (integers.astype(jnp.float32) @ (down @ mean)) * scale
        return {"up": integers, "scale": scale, "down": down, "offset": offset}

    def score(self, state: State, x: Array, layer: Array | int) -> Array:
        """f32[tokens, n] for x: [tokens, d] (see `Predictor.score`)."""
        scale, offset = (
            lax.dynamic_index_in_dim(state[name], layer, keepdims=False)
            for name in ("scale", "offset")
        )
        return product(product(x, state["down"], layer), state["up"], layer) * scale + offset

    def bytes(self, n: int, d: int, dtype: Any) -> int:
        """U in 8 bits with its scales and offsets, and Q in float32."""
        rank = self._rank(n, d)
        return n * rank + (2 * n + rank * d) * jnp.dtype(jnp.float32).itemsize

    def _rank(self, n: int, d: int) -> int:
        return min(n, d, -(-d // 64) * 16) if self.rank is None else self.rank


def _shrunk(mean: Array, covariance: Array) -> Array:
    d = mean.shape[0]
    # The mean square of x, not its variance, which is zero for a single token.
    square = (jnp.trace(covariance) + mean @ mean) / d
    square = jnp.where(square > 0, square, 1.0)
    return (1 - _SHRINKAGE) * covariance + _SHRINKAGE * square * jnp.eye(d)


def _square_root(covariance: Array) -> Array:
    values, vectors = jnp.linalg.eigh(covariance)
    return (vectors * jnp.sqrt(jnp.maximum(values, 0.0))) @ vectors.T
