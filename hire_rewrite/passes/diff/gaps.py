"""Pair equations by their order: the best pairs of which none cross."""

from __future__ import annotations

import bisect
import collections
from collections.abc import Callable, Hashable, Sequence

_LARGEST_TABLE = 250_000
"""Entries of a table that aligns a gap; larger gaps are aligned by counting equal equations."""


def in_order(
    olds: Sequence[int],
    news: Sequence[int],
    score: Callable[[int, int], float],
    keys: Sequence[Sequence[Hashable]],
) -> list[tuple[int, int]]:
    """Pairs of numbers of equations, none of which cross, of the greatest score in all.

    Args:
      olds, news: the numbers, increasing.
      score: of a pair; 0 if it may not be one.
      keys: for both sides what equations of each number compute; where there are many, only those
        that compute the same are paired.
    """
    if len(olds) * len(news) > _LARGEST_TABLE:
        return _counted(olds, news, keys)
    rows, columns = len(olds), len(news)
    best = [[0.0] * (columns + 1) for _ in range(rows + 1)]
    scores = [[score(i, j) for j in news] for i in olds]
    for r in range(rows - 1, -1, -1):
        for c in range(columns - 1, -1, -1):
            skip = max(best[r + 1][c], best[r][c + 1])
            both = scores[r][c]
            best[r][c] = max(skip, best[r + 1][c + 1] + both) if both else skip
    pairs, r, c = [], 0, 0
    while r < rows and c < columns:
        both = scores[r][c]
        if both and best[r][c] == best[r + 1][c + 1] + both:
            pairs.append((olds[r], news[c]))
            r, c = r + 1, c + 1
        elif best[r][c] == best[r + 1][c]:
            r += 1
        else:
            c += 1
    return pairs


def _counted(
    olds: Sequence[int], news: Sequence[int], keys: Sequence[Sequence[Hashable]]
) -> list[tuple[int, int]]:
    """The n-th of each kind of equation with the n-th, as far as they are in order."""
    waiting: dict[Hashable, collections.deque[int]]
    waiting = collections.defaultdict(collections.deque)
    for i in olds:
        waiting[keys[0][i]].append(i)
    pairs = [(waiting[keys[1][j]].popleft(), j) for j in news if waiting[keys[1][j]]]
    return increasing(sorted(pairs))


def increasing(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The most of the pairs, sorted by the first, whose seconds increase too."""
    ends: list[int] = []
    last: list[int] = []
    before: list[int] = []
    for n, (_, j) in enumerate(pairs):
        place = bisect.bisect_left(ends, j)
        if place == len(ends):
            ends.append(j)
            last.append(n)
        else:
            ends[place], last[place] = j, n
        before.append(last[place - 1] if place else -1)
    chain: list[tuple[int, int]] = []
    n = last[-1] if last else -1
    while n >= 0:
        chain.append(pairs[n])
        n = before[n]
    return chain[::-1]
