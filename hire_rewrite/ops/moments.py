"""First and second moments of activations: all that a predictor needs to know about them.

A predictor that is fitted to the activations it will see recalls far more than one fitted to the
weights alone, because activations fill only a small part of their space. What matters about them
is their mean and covariance, and both follow from sums that are accumulated batch by batch.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """Sums over the tokens seen so far; `a + b` are the sums over the tokens of both.

    All fields may have the same leading axes, for instance one of layers.

    Attributes:
      count: f32[], how many tokens.
      total: f32[d], Σ x.
      second: f32[d, d], Σ x xᵀ.
    """

    count: Array
    total: Array
    second: Array

    @classmethod
    def zeros(cls, d: int) -> Moments:
        """The moments of no tokens of width `d`."""
        return cls(jnp.zeros(()), jnp.zeros(d), jnp.zeros((d, d)))

    @classmethod
    def of(cls, x: Array) -> Moments:
        """The moments of x: [..., d], every position of its leading axes a token."""
        tokens = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        second = jnp.matmul(tokens.T, tokens, precision=lax.Precision.HIGHEST)
        return cls(jnp.float32(tokens.shape[0]), tokens.sum(0), second)

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.count + other.count, self.total + other.total, self.second + other.second
        )

    def mean_and_covariance(self) -> tuple[Array, Array]:
        """The mean f32[d] and the covariance f32[d, d], the latter divided by the count.

        Both are zero where no token was seen.
        """
        count = jnp.maximum(self.count, 1.0)
        mean = self.total / count[..., None]
        outer = mean[..., :, None] * mean[..., None, :]
        return mean, self.second / count[..., None, None] - outer
