"""How much of what is wanted a search finds, and how many candidates it needs for that."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

LADDER = (64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
"""Numbers of candidates that are tried."""
GOAL = (0.999, 0.99)
"""Recall of the greatest, and of the 64 greatest, at which sides are compared."""

Recall = tuple[float, float]


def recall(found: np.ndarray, wanted: np.ndarray) -> Recall:
    """The share of queries whose greatest is found, and the mean share of all that are wanted.

    Args:
      found: int[q, m], rows in any order, none twice.
      wanted: int[q, k], the true ones, the greatest first.
    """
    hits = (wanted[:, :, None] == found[:, None, :]).any(-1)
    return float(hits[:, 0].mean()), float(hits.mean())


def places(ordered: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """int[q, k], where each wanted row stands in ordered: int[q, m]; m if it does not."""
    q, m = ordered.shape
    lookup = np.full((q, 1 + int(max(ordered.max(), wanted.max()))), m, np.int32)
    np.put_along_axis(lookup, ordered, np.arange(m, dtype=np.int32)[None], 1)
    return np.take_along_axis(lookup, wanted, 1)


def by_candidates(where: np.ndarray, ladder: Sequence[int] = LADDER) -> dict[int, Recall]:
    """The recall of the first so many rows of an order, for what `places` returns."""
    return {
        count: (float((where[:, 0] < count).mean()), float((where < count).mean()))
        for count in ladder
    }


def needed(
    at: Callable[[int], Recall], ladder: Sequence[int] = LADDER, goal: Recall = GOAL
) -> tuple[int, Recall]:
    """The first number of candidates that reaches the goal, or the last, and its recall.

    `at` is asked for one after another, and for none behind the first that does.
    """
    for count in ladder:
        got = at(count)
        if reaches(got, goal):
            break
    return count, got


def reaches(got: Recall, goal: Recall = GOAL) -> bool:
    return got[0] >= goal[0] and got[1] >= goal[1]
