"""Random rows and queries of other sizes, put together of parts of real ones.

How well products can be guessed depends on how rows and queries are spread: independent normal
numbers have no structure that a low rank, a code book or a scale for 32 columns could use, and a
spectrum that falls fast would flatter all of them. So a vector of d = 512 · b numbers consists of b
parts, each the first 512 coordinates of a random real vector: of a row of SmolLM2's, or of what it
computes for a token.

* In every part rows and queries are spread as in the model, in the model's own coordinates (on
  which rounding errors depend), with all that is not normal about them. Since parts are drawn
  independently, every eigenvalue of a covariance stands b times: what takes rank r in the model
  takes b · r here. That flatters no low rank: larger models hardly use more of their dimensions.
* The parts of a row have about the same norm, so that norms differ as much as those of real rows.
* Queries to fit to are made of the states at one text, those to measure with of another's.

Normal numbers with the real covariances were tried: they gave `Quantized` the recall that it has on
the model, but `LowRank` more, for the real tokens that are unlike the others were missing.
"""

from __future__ import annotations

import jax
import numpy as np
from jax import Array

BASE = 512
_NEAR = 200  # parts of a row are that fraction of all rows apart, at most, in the order of norms


def draw_rows(rows: np.ndarray, n: int, d: int, seed: int = 0, base: int = BASE) -> np.ndarray:
    """f32[n, d] of parts of rows: [m, ≥ base]; d is a multiple of `base`."""
    parts = rows[:, :base] - rows[:, :base].mean(0)  # which adds the same to all products
    order = np.argsort(np.linalg.norm(parts, axis=1))
    rng, near = np.random.default_rng(seed), len(parts) // _NEAR
    places = rng.integers(0, len(parts), n)
    drawn = np.empty((n, d), np.float32)
    for columns in _columns(d, base):
        others = np.abs(places + rng.integers(-near, near + 1, n))
        # Mirrored at both ends: the longest row stands no more often than others.
        others = np.where(others < len(parts), others, 2 * len(parts) - 2 - others)
        drawn[:, columns] = parts[order[others]]
    return drawn


def draw_queries(
    states: np.ndarray, count: int, d: int, seed: int = 0, base: int = BASE
) -> np.ndarray:
    """f32[count, d] of parts of states: [q, ≥ base]; d is a multiple of `base`."""
    rng = np.random.default_rng(seed)
    drawn = np.empty((count, d), np.float32)
    for columns in _columns(d, base):
        drawn[:, columns] = states[rng.integers(0, len(states), count), :base]
    return drawn


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


def _columns(d: int, base: int) -> list[slice]:
    if d % base:
        raise ValueError(f"{d} is no multiple of {base}, the coordinates of a part")
    return [slice(start, start + base) for start in range(0, d, base)]
