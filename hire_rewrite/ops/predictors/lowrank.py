"""HiRE-LR: a product of two thin matrices (arXiv 2402.09360), fitted to the activations.

Wanted are U: [n, r] and Q: [r, d] that minimize E‖W(x − μ) − U Q (x − μ)‖² over the activations
x, whose mean is μ and whose covariance is C. Substitute x = μ + S z with S = C^½, so that z is
white, E z zᵀ = I. The expectation is then ‖(W − U Q) S‖² in the Frobenius norm, and by Eckart and
Young the best U Q S is W S cut to its r greatest singular values. With the eigenvectors V and
eigenvalues Λ of S WᵀW S (only [d, d], whatever n is),

    U = W S V_r      Q = V_rᵀ S⁻¹ = Λ_r⁻¹ V_rᵀ S WᵀW      scores = U (Q x) + W μ − U Q μ.

The second form of Q needs no inverse of S. Without activations C = I and μ = 0, which is the plain
singular value decomposition of W.

U is the part that is read most, and 8 bits a number suffice for it (`bits=None` keeps it as narrow
as the weight is, and the fit exact): rounding adds about 1 % to an error of 30 to 50 % that the cut
to rank r leaves. Any diagonal matrix may move from U to Q; Λ^¼ in both makes the rounding of rows
with one scale each cost least.

Where only the greatest products are wanted, as in a vocabulary head, three things change. A row's
error counts by the chance of the row to be among them: with products taken as normal, of mean
m_v = w_v μ and variance s_v² = w_v C w_vᵀ, that is P(N(m_v, s_v²) > τ), with τ such that these add
up to the number that is wanted; the weight is its root. Rows count less their mean, which moves all
products alike, and x with its mean. And since rows that are guessed badly are those that are
missed, a row is chosen by its score plus a bonus of some standard deviations of its error.

Measured on the vocabulary head of SmolLM2-135M (V = 49,152, d = 576), 4096 tokens of help texts for
the fit: the most probable token among 256 candidates and the 64 most probable among 512, on other
kinds of text, 640 tokens of each (`docs/quality.md` has more).

    rank, fit             code          license       table
    128, least squares    0.978  0.940  0.969  0.880  0.947  0.915
    128, for the greatest 0.992  0.957  0.981  0.894  0.966  0.932
    192, least squares    0.998  0.972  0.991  0.934  0.981  0.950
    192, for the greatest 0.998  0.981  0.997  0.943  0.995  0.966
    192, plain SVD        0.3 to 0.6
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.scipy.stats import norm

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.ops.certify.rounding import power_below
from hire_rewrite.ops.moments import Moments
from hire_rewrite.ops.narrow import matmul
from hire_rewrite.ops.predictors.protocol import Choose, Read, State, register_predictor, written
from hire_rewrite.ops.quantize import quantize_rows
from hire_rewrite.settings import check_settings

_SHRINKAGE = 1e-3
"""The part of the covariance that is replaced by the mean square of x in all directions alike.

Directions that the calibration did not show, all but a few when it has fewer tokens than d, are
then rare instead of impossible. Between 0.01 % and 1 % recall was the best and hardly changed, from
128 to 16 K tokens at d = 576; 5 % and more, and also the shrinkage that is optimal for normally
distributed tokens (Chen et al. 2010), lost recall on other kinds of text."""

_LARGE = 10.0
"""The square of the mean counts at most so many times the variance. In SmolLM2 it is 0.2 to 2.8
times that; where it is a million times that, float32 would leave nothing else of the fit. (The
products of the mean are an offset of the scores, and right in any case.)"""

_FLOOR = 0.01
"""What a row counts that is never among the greatest, where one that always is counts 1."""

_BONUS = 4.0
"""Standard deviations of its error that a row is taken for greater by, when rows are chosen. On
text of other kinds than the calibration's the greatest row was guessed 2.6 to 6.7 of them too low,
on average; 3 to 6 recalled about as much."""

_NEGLIGIBLE = 1e-7
"""Eigenvalues below this part of the greatest are rounding errors of float32."""


@register_predictor
@dataclasses.dataclass(frozen=True, repr=False)
class LowRank:
    """Score with a product of two thin matrices.

    Fitted to activations (calibration) it recalls well at a quarter of the rows' length; without,
    it is hardly of use.

    Args:
      rank: None for a quarter of d, rounded up to a multiple of 16, at most d and n.
      bits: how the large factor is stored, 8 or None for the weight's own precision (bfloat16 for
        weights of 16 bits and less, otherwise float32).

    Raises:
      HireRewriteError: the rank is not a positive int, or another number of bits.

    Examples:
      >>> import jax, jax.numpy as jnp, hire_rewrite as hire
      >>> from hire_rewrite.ops.moments import Moments
      >>> rows, seen = jax.random.normal(jax.random.key(0), (2, 512, 64))
      >>> state = hire.LowRank(16).fit(rows, Moments.of(seen))
      >>> state["up"].shape, state["down"].shape
      ((512, 16), (16, 64))
    """

    rank: int | None = None
    bits: int | None = 8

    def __post_init__(self) -> None:
        check_settings(self)
        if self.bits not in (None, 8) or isinstance(self.bits, bool):
            raise HireRewriteError(
                f"LowRank: bits={self.bits!r} is not supported: give bits=8, or None to keep the "
                "weight's precision"
            )
        if self.rank is None:
            return
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise HireRewriteError(
                f"LowRank: rank={self.rank!r} must be a positive int, or None for a quarter of the "
                "rows' length"
            )

    def __repr__(self) -> str:
        return written(self)

    @property
    def wants_calibration(self) -> bool:
        """True: see the figures above."""
        return True

    def check(self, n: int, d: int, *, site: str = "", tokens: int | None = None) -> None:
        """Raise HireRewriteError if n rows of length d have no such rank, or tokens are too few."""
        prefix = f"{site + ': ' if site else ''}LowRank: rank="
        rank = self._rank(n, d)
        if rank > min(n, d):
            raise HireRewriteError(
                f"{prefix}{rank} is more than a {n} × {d} matrix can have: give at most "
                f"{min(n, d)}, or None for {LowRank()._rank(n, d)}"
            )
        if tokens is not None and 0 < tokens < rank:
            raise HireRewriteError(
                f"{prefix}{rank} needs at least {rank} calibration tokens, got {tokens}: give more "
                "batches, or a lower rank"
            )

    def fit(self, rows: Array, moments: Moments | None = None, top: int | None = None) -> State:
        """Fit to rows: [n, d] and, if given, the moments of the vectors that are to be scored.

        Returns:
          `up`: i8[n, r] and its `scale`: f32[n] (U), `down`: f32[r, d] (Q), `center`: f32[r] and
          `offset`: f32[n], so that scores are U (Q x + center) + offset; with `top` also `bonus`:
          f32[n]. With `bits=None` there is no scale, and `up` is bfloat16 or float32.
        """
        n, d = rows.shape
        self.check(n, d)
        rank = self._rank(n, d)
        w = rows.astype(jnp.float32)
        unit = _unit(w)
        w = w / unit
        with jax.default_matmul_precision("highest"):
            mean, covariance = jnp.zeros(d, jnp.float32), jnp.eye(d, dtype=jnp.float32)
            near = mean
            if moments is not None:
                mean, covariance = moments.mean, moments.covariance()
                near = _bounded(mean, covariance)
                covariance = _shrunk(near, covariance)
            if moments is None or top is None:
                seen, weight, metric = w, jnp.ones(n, jnp.float32), covariance
            else:
                seen, metric = w - w.mean(0)[None], covariance + jnp.outer(near, near)
                weight = _weights(w @ mean, _deviation(w, covariance), min(top, n / 2))
            gram = (seen * weight[:, None]).T @ seen
            root = metric if moments is None else _square_root(metric)
            gram_root = gram @ root
            values, vectors = jnp.linalg.eigh(root @ gram_root)
            # Ascending, so the last are the greatest.
            values, vectors = values[-rank:], vectors[:, -rank:]
            sound = values > _NEGLIGIBLE * values[-1]
            quarter = jnp.where(sound, jnp.where(sound, values, 1.0) ** 0.25, 0.0)
            inverse = jnp.where(sound, 1.0 / jnp.where(sound, quarter, 1.0), 0.0)
            right = (root @ vectors) * inverse[None]
            down = (inverse**3)[:, None] * (gram_root @ vectors).T
            # Without the mean, which may be large, little is lost where Q x is rounded.
            up, offset = w @ right, unit * (w @ mean)
            state = {"down": down, "center": -(down @ mean), "offset": offset}
            if self.bits is None:
                state["up"] = (unit * up).astype(_stored(rows.dtype))
            else:
                state["up"], scale = quantize_rows(up)
                state["scale"] = unit * scale
            if top is not None:
                # Without moments the scale of the errors is not known.
                error = unit * _deviation(seen - (seen @ right) @ down, covariance)
                state["bonus"] = jnp.zeros(n, jnp.float32) if moments is None else _BONUS * error
        return state

    def score(
        self, state: State, x: Array, layer: Array | int, choose: Choose | None = None
    ) -> Array:
        """f32[tokens, n] for x: [tokens, d] (see `Predictor.score`)."""
        x = matmul(x, state["down"], layer, None, state["center"])
        return matmul(x, state["up"], layer, state.get("scale"), state["offset"])

    def bytes(self, n: int, d: int, dtype: Any, tokens: int = 1) -> int:
        """U with its scales, offsets and bonus (as far as there are), and Q in float32."""
        return sum(read.bytes for read in self.reads(n, d, dtype))

    def reads(self, n: int, d: int, dtype: Any, tokens: int = 1) -> tuple[Read, ...]:
        """See `Timed`."""
        rank, wide = self._rank(n, d), jnp.dtype(jnp.float32).itemsize
        if self.bits is None:
            stored, up = _stored(dtype), n * rank * _stored(dtype).itemsize + 2 * n * wide
        else:
            stored, up = jnp.dtype(jnp.int8), n * rank + 3 * n * wide
        down = Read("scored_float32", rank * (d + 1) * wide, tokens)
        return Read(f"scored_{stored}", up, tokens), down

    def _rank(self, n: int, d: int) -> int:
        return min(n, d, -(-d // 64) * 16) if self.rank is None else self.rank


def _stored(dtype: Any) -> Any:
    """The dtype of the large factor for weights of a dtype."""
    # Not float16: what becomes of the factors' range is not known.
    return jnp.dtype(jnp.bfloat16 if jnp.dtype(dtype).itemsize <= 2 else jnp.float32)


def _unit(rows: Array) -> Array:
    """f32[], the power of two that rows are divided by, exactly, so that their squares neither
    vanish nor overflow."""
    power = power_below(jnp.abs(rows).max())
    return jnp.where((power > 0) & (power < jnp.inf), power, 1.0)


def _bounded(mean: Array, covariance: Array) -> Array:
    """A mean that is large beside the deviations, made shorter."""
    square, variance = mean @ mean, jnp.trace(covariance)
    large = (variance > 0) & (square > _LARGE * variance)
    return jnp.where(large, jnp.sqrt(_LARGE * variance / jnp.where(large, square, 1.0)), 1.0) * mean


def _shrunk(mean: Array, covariance: Array) -> Array:
    d = mean.shape[0]
    # The mean square of x, not its variance, which is zero for a single token.
    square = (jnp.trace(covariance) + mean @ mean) / d
    square = jnp.where(square > 0, square, 1.0)
    return (1 - _SHRINKAGE) * covariance + _SHRINKAGE * square * jnp.eye(d, dtype=jnp.float32)


def _deviation(rows: Array, covariance: Array) -> Array:
    """The standard deviation of x · row for rows: [n, d]."""
    return jnp.sqrt(jnp.maximum(((rows @ covariance) * rows).sum(1), 0.0))


def _weights(level: Array, deviation: Array, top: float) -> Array:
    """How much each row's squared error counts, where the `top` greatest products are wanted.

    Args:
      level, deviation: the mean and standard deviation of each row's product, f32[n].
    """
    greatest = deviation.max()
    deviation = jnp.maximum(deviation, jnp.where(greatest > 0, 1e-6 * greatest, 1.0))

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) / 2
        many = norm.sf((middle - level) / deviation).sum() > top
        return jnp.where(many, middle, low), jnp.where(many, high, middle)

    bounds = (level - 10 * deviation).min(), (level + 10 * deviation).max()
    threshold = lax.fori_loop(0, 40, halve, bounds)[0]
    return jnp.sqrt(norm.sf((threshold - level) / deviation)) + _FLOOR


def _square_root(covariance: Array) -> Array:
    values, vectors = jnp.linalg.eigh(covariance)
    return (vectors * jnp.sqrt(jnp.maximum(values, 0.0))[None]) @ vectors.T
