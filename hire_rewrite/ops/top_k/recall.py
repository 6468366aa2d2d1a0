"""How many of the k greatest survive if each shard hands on only its own greatest few.

With n values in s shards and random placement, the number r of the k greatest that lie in a shard
of m = n / s values is hypergeometric. A shard that hands on q values loses r − q of them, so

    expected recall = 1 − (s / k) Σ_{r > q} (r − q) C(k, r) C(n − k, m − r) / C(n, m)

(arXiv 2506.04165). The greatest value is never lost, and with q = k nothing is.
"""

from __future__ import annotations

import bisect
import math

__all__ = ["allowed_misses", "expected_recall", "kept_per_shard"]

_FAILURES = 1e-3
"""Of a thousand rows one is expected to miss more than it may, and is selected exactly."""


def expected_recall(n: int, k: int, shards: int, keep: int) -> float:
    """The expected share of the k greatest of n values among the `keep` greatest of each shard.

    Shards of unequal size count as if all were as great as the greatest, which loses most.
    """
    size = -(-n // shards)
    missed = sum(
        (r - keep) * _hypergeometric(n, k, size, r) for r in range(keep + 1, min(k, size) + 1)
    )
    return max(0.0, 1.0 - shards * missed / k)


def kept_per_shard(n: int, k: int, shards: int, recall_target: float) -> int:
    """How many values each shard hands on, so that hardly a row misses more than it may.

    The expected number of misses bounds the probability of a row with more than are allowed
    (Markov's inequality); the smallest number is taken with which that is at most 1 in 1000.
    """
    most = min(k, -(-n // shards))
    if recall_target >= 1.0:
        return most
    enough = 1.0 - _FAILURES * (allowed_misses(k, recall_target) + 1) / k
    sizes = range(-(-k // shards), most)
    place = bisect.bisect_left(sizes, enough, key=lambda keep: expected_recall(n, k, shards, keep))
    return sizes[place] if place < len(sizes) else most


def allowed_misses(k: int, recall_target: float) -> int:
    """How many of the k greatest a row may miss without falling short of the target."""
    return math.floor((1.0 - recall_target) * k + 1e-9)


def _hypergeometric(n: int, k: int, size: int, r: int) -> float:
    """The probability that a shard of `size` of n places has exactly r of k."""
    if r > k or r > size or size - r > n - k:
        return 0.0
    return math.exp(_log_choose(k, r) + _log_choose(n - k, size - r) - _log_choose(n, size))


def _log_choose(n: int, r: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(r + 1) - math.lgamma(n - r + 1)
