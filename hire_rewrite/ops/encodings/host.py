"""Rows on the host, a few at a time: weights may fill the memory, and be a transposed view."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

__all__ = ["float32_of", "pieces", "sample"]

_CHUNK = 1 << 16
"""Numbers of a piece: so few that all that is made of them stays in the cache."""

_SAMPLE = 8
"""Rows of a sample."""


def pieces(rows: np.ndarray) -> Iterator[np.ndarray]:
    """[m, d], all of rows: [L, n, d] in order.

    Examples:
      >>> [piece.shape for piece in pieces(np.zeros((2, 100, 1024)))]
      [(64, 1024), (36, 1024), (64, 1024), (36, 1024)]
    """
    step = max(1, _CHUNK // max(1, rows.shape[2]))
    for layer in rows:
        for start in range(0, len(layer), step):
            yield layer[start : start + step]


def sample(rows: np.ndarray) -> np.ndarray:
    """[m, d], a few of rows: [L, n, d].

    Examples:
      >>> sample(np.arange(64).reshape(4, 16, 1)).ravel().tolist()
      [0, 9, 18, 27, 36, 45, 54, 63]
    """
    layers, n, _ = rows.shape
    if rows.size == 0:
        return rows[0] if layers else np.zeros((0, rows.shape[2]), rows.dtype)
    return rows[np.divmod(np.linspace(0, layers * n - 1, _SAMPLE).astype(int), n)]


def float32_of(rows: np.ndarray) -> np.ndarray | None:
    """The same numbers in float32; None if it does not hold all of them, or one is NaN or infinite.

    Examples:
      >>> float32_of(np.float16([0.1])).dtype
      dtype('float32')
      >>> float32_of(np.float64([0.1])) is None
      True
    """
    with np.errstate(over="ignore"):  # to infinity
        wide = np.ascontiguousarray(rows, np.float32)
    same = rows.dtype == np.float32 or (wide == rows).all()
    return wide if same and np.isfinite(wide).all() else None
