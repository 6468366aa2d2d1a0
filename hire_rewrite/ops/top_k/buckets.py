"""The k greatest of many values by buckets: a few maxima of each, then a sort of those alone.

Where sorting is slow (TPU) `lax.top_k` of a long axis costs far more than passing over it. Here
place i belongs to bucket i mod b; each bucket gives its greatest few, one at a time (arXiv
2506.04165), and the k greatest of those are selected. Under random placement the expected recall
is that of shards (`recall`).
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from hire_rewrite.ops.top_k.keys import from_keys, to_keys
from hire_rewrite.ops.top_k.merge import first
from hire_rewrite.ops.top_k.recall import kept_per_shard
from hire_rewrite.ops.top_k.select import top_k

__all__ = ["bucket_top_k"]

_BUCKETS = 512
"""A multiple of the 128 lanes of a TPU's vectors."""

_SHORTER = 4
"""How many times shorter than the axis the lists have to be."""


def bucket_top_k(x: Array, k: int) -> tuple[Array, Array]:
    """Nearly the k greatest of x: [..., n], in the order of `lax.top_k`, and where they are.

    One row in a thousand misses one of them, if they lie at random. Short rows, and rows of which
    many values are wanted, are selected exactly.
    """
    n = x.shape[-1]
    each = kept_per_shard(n, k, _BUCKETS, 1.0 - 1e-9)
    if _SHORTER * _BUCKETS * each > n:
        return top_k(x, k)
    keys = to_keys(x)
    last = jnp.iinfo(keys.dtype).max
    depth = -(-n // _BUCKETS)
    padding = [(0, 0, 0)] * (x.ndim - 1) + [(0, depth * _BUCKETS - n, 0)]
    keys = lax.pad(keys, jnp.asarray(last, keys.dtype), padding)
    keys = keys.reshape(*x.shape[:-1], depth, _BUCKETS)
    rows = lax.broadcasted_iota(jnp.int32, keys.shape, keys.ndim - 2)
    taken = jnp.zeros(keys.shape, bool)
    best, places = [], []
    for _ in range(each):
        rest = jnp.where(taken, last, keys)
        key = rest.min(-2, keepdims=True)
        row = jnp.where((rest == key) & ~taken, rows, depth - 1).min(-2, keepdims=True)
        taken |= rows == row
        best.append(key)
        places.append(row * _BUCKETS + jnp.arange(_BUCKETS, dtype=jnp.int32))
    length = (*x.shape[:-1], each * _BUCKETS)
    key, place = first(
        jnp.concatenate(best, -2).reshape(length), jnp.concatenate(places, -2).reshape(length), k
    )
    return from_keys(key, x.dtype), place
