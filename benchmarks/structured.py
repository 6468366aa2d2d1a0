"""Random rows and queries that are spread as those of a real language model.

How well products can be guessed depends on how rows and queries are spread: independent normal
numbers have no structure that a low rank, a code book or a scale for 32 columns could use, and a
spectrum that falls fast would flatter all of them. So everything here is taken from real rows and
real queries, and carried over to other sizes with as few liberties as possible:

* The covariance of the rows, that of the queries and the queries' mean are taken in the model's
  own coordinates (rounding errors depend on them), of which the first 512 count. Of a vector of
  d = 512 · b numbers each of the b parts has that covariance, independently. Thus every eigenvalue
  stands b times: what takes rank r in the model takes b · r here. Larger models hardly use more of
  their dimensions than that, so this flatters no low rank.
* Rows are normal with that covariance, times a factor drawn from the norms of the real rows.
  Queries are normal.

With rows and queries of SmolLM2's head the greatest products then stand out as much as the real
ones (`outstanding`; `benchmarks.head` writes both to its results), so that no outliers are added.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

BASE = 512
_STEP = 1 << 14  # rows that are drawn at a time


@dataclasses.dataclass(frozen=True)
class Spread:
    """How the rows of a matrix and the vectors they are multiplied with are spread.

    Attributes:
      rows, queries: f32[c, c], the square roots of the covariances.
      sizes: f32[m], norms of rows, with a mean square of one; to draw from.
      mean: f32[c], of the queries.
    """

    rows: np.ndarray
    queries: np.ndarray
    sizes: np.ndarray
    mean: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray, queries: np.ndarray, base: int = BASE) -> Spread:
        """That of real rows [n, d] and queries [q, d], in their first `base` coordinates."""
        rows = rows[:, :base] - rows[:, :base].mean(0)  # which adds the same to all products
        queries, sizes = queries[:, :base], np.linalg.norm(rows, axis=1)
        mean = queries.mean(0)
        return cls(
            rows=_square_root(rows),
            queries=_square_root(queries - mean),
            sizes=(sizes / np.sqrt(np.square(sizes).mean())).astype(np.float32),
            mean=mean.astype(np.float32),
        )

    def draw_rows(self, key: Array, n: int, d: int) -> np.ndarray:
        """f32[n, d]; d is a multiple of the coordinates that were taken."""
        normal, size = jax.random.split(key)
        factors = np.asarray(jax.random.choice(size, jnp.asarray(self.sizes), (n, 1)))
        rows = np.empty((n, d), np.float32)
        for i, start in enumerate(range(0, n, _STEP)):
            part = rows[start : start + _STEP]
            part[:] = _draw(jax.random.fold_in(normal, i), self.rows, *part.shape)
            part *= factors[start : start + _STEP]
        return rows

    def draw_queries(self, key: Array, count: int, d: int) -> np.ndarray:
        """f32[count, d]; d as in `draw_rows`."""
        drawn = _draw(key, self.queries, count, d)
        return np.asarray(drawn + np.tile(self.mean, d // len(self.mean)))


def outstanding(rows: Array, queries: Array) -> dict[str, float]:
    """The greatest products, in standard deviations of all products of their query.

    Args:
      rows: [n, d].
      queries: [q, d], at most a few hundred.

    Returns:
      The mean over queries of the greatest, second, 16th and 64th, and the median of the distance
      between the first two.
    """

    @jax.jit
    def standard(rows: Array, query: Array) -> Array:
        products = rows @ query
        return jax.lax.top_k((products - products.mean()) / products.std(), 64)[0]

    found = np.stack([np.asarray(standard(rows, query)) for query in queries])
    means = {str(rank): round(float(found[:, rank - 1].mean()), 3) for rank in (1, 2, 16, 64)}
    return {**means, "median gap": round(float(np.median(found[:, 0] - found[:, 1])), 3)}


def _draw(key: Array, root: np.ndarray, n: int, d: int) -> Array:
    parts = d // len(root)
    if parts * len(root) != d:
        raise ValueError(f"{d} is no multiple of the {len(root)} coordinates that were taken")
    return (jax.random.normal(key, (n * parts, len(root))) @ root).reshape(n, d)


def _square_root(centered: np.ndarray) -> np.ndarray:
    """The symmetric square root of the covariance of centered: [n, c]."""
    values, vectors = np.linalg.eigh(centered.T.astype(np.float64) @ centered / len(centered))
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    return root.astype(np.float32)
