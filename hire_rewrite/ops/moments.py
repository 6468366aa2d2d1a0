"""Mean and covariance of activations: all that a predictor needs to know about them.

A predictor that is fitted to the activations it will see recalls far more than one fitted to the
weights alone, because activations fill only a small part of their space. Batches are combined by
their means and the sums of squares about them (Chan, Golub and LeVeque 1979): the mean of squares
less the square of the mean would lose everything where a mean is large beside its deviations.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """Moments of the tokens seen so far; `a.combine(b)` has those of both.

    All fields may have the same leading axes, for instance one of layers. All zeros are the moments
    of no tokens.

    Attributes:
      count: f32[], how many tokens.
      mean: f32[d].
      scatter: f32[d, d], Σ (x − mean) (x − mean)ᵀ.
    """

    count: Array
    mean: Array
    scatter: Array

    @classmethod
    def zeros(cls, d: int) -> Moments:
        """The moments of no tokens of width `d`."""
        return cls(*(jnp.zeros(shape, jnp.float32) for shape in ((), (d,), (d, d))))

    @classmethod
    def of(cls, x: Array) -> Moments:
        """The moments of x: [..., d], every position of its leading axes a token."""
        tokens = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        count = jnp.float32(tokens.shape[0])
        tokens_or_one = jnp.maximum(count, 1.0)
        near = tokens.sum(0) / tokens_or_one
        rest = tokens - near[None]
        off = rest.sum(0) / tokens_or_one  # what the mean was rounded by
        rest = rest - off[None]
        return cls(count, near + off, jnp.matmul(rest.T, rest, precision=lax.Precision.HIGHEST))

    def combine(self, other: Moments) -> Moments:
        """The moments of the tokens of both."""
        count = self.count + other.count
        share = other.count / jnp.maximum(count, 1.0)
        step = other.mean - self.mean
        outer = step[..., :, None] * step[..., None, :]
        between = (self.count * share)[..., None, None] * outer
        return Moments(
            count, self.mean + share[..., None] * step, self.scatter + other.scatter + between
        )

    def covariance(self) -> Array:
        """f32[d, d], the scatter divided by the count; zero where no token was seen."""
        return self.scatter / jnp.maximum(self.count, 1.0)[..., None, None]
