"""Selecting the k greatest of many scores, as `lax.top_k` does but without its slow cases.

Selection must not cost more than the product that it saves. `lax.top_k` is quick on CPU as long
as XLA calls its runtime's partial sort for it. It does so for float32 alone: other types are sorted
whole (measured for 49,152 bfloat16 scores: 10 ms; float32: 0.1 ms), and so are float32 scores, up
to jaxlib 0.11, where one of the two results is not used.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.ops.kernels import KernelOperation
from hire_rewrite.ops.top_k.keys import from_keys, lowest, to_keys

_TWO_STAGES = 1 << 17
"""From this many scores on, CPU selects in two stages. The partial sort is quick while few scores
enter its heap, and that depends on their order: 262,144 normal scores took 0.50 ms for k = 256 and
0.90 ms for 1024, ascending ones 11 and 12 ms. Two stages took 0.31 and 0.85, and 0.8 and 1.9 ms.
Of 49,152 scores one stage takes 0.1 ms, and at worst 1.7 ms."""

Select = Callable[[Array, int], tuple[Array, Array]]
"""The greatest values along the last axis and their places, as `lax.top_k`."""


def top_k(scores: Array, k: int) -> tuple[Array, Array]:
    """The k greatest scores along the last axis, in descending order, and where they are.

    The result is that of `lax.top_k`, bit for bit: of equal scores the one with the lowest index
    comes first, and NaN is greater than infinity (NaN with the sign bit set, less than −infinity).

    Args:
      scores: [..., n].
      k: at most n.

    Returns:
      Values [..., k] in the dtype of `scores`, and indices i32[..., k].

    Raises:
      HireRewriteError: k is more than n.
    """
    if not 0 <= k <= scores.shape[-1]:
        raise HireRewriteError(
            f"top_k: k={k} of {scores.shape[-1]} scores: give a k between 0 and their number"
        )
    return top_k_operation(scores, k=k)


@KernelOperation
def top_k_operation(scores: Array, *, k: int) -> tuple[Array, Array]:
    """What platforms may compute otherwise in `top_k`."""
    if k == 0 or not fits_float32(scores.dtype):
        return plain_top_k(scores, k)
    in_stages = through_float32(_in_stages)
    return lax.platform_dependent(
        scores, cpu=lambda s: in_stages(s, k), default=lambda s: plain_top_k(s, k)
    )


def set_apart(values: Array, scores: Array, *, k: int) -> tuple[Array, Array, Array]:
    """The groups of values with the greatest scores, and the values that are left.

    Args:
      values: [tokens, n], in G groups that lie one behind the other.
      scores: [tokens, G].
      k: at most G. Of equal scores the first count, as in `top_k`.

    Returns:
      places: i32[tokens, k], the numbers of the groups, in any order.
      apart: [tokens, k · n / G], their values, in this order.
      others: [tokens, n], all values with those zero.

    Examples:
      >>> places, apart, others = set_apart(jnp.array([[3.0, -5, 1]]), jnp.array([[3, 5, 1]]), k=1)
      >>> places.tolist(), apart.tolist(), others.tolist()
      ([[1]], [[-5.0]], [[3.0, 0.0, 1.0]])
    """
    return _set_apart(values, scores, k)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _set_apart(values: Array, scores: Array, k: int) -> tuple[Array, Array, Array]:
    return set_apart_operation(values, scores, k=k)


@_set_apart.defjvp
def _(k: int, primals: Any, tangents: Any) -> Any:
    """In the order of the places that were returned, which a kernel chooses."""
    places, apart, others = _set_apart(*primals, k)
    none = np.zeros(places.shape, jax.dtypes.float0)
    moved = _split(tangents[0], places, primals[1].shape[1])
    return (places, apart, others), (none, *moved)


@KernelOperation
def set_apart_operation(values: Array, scores: Array, *, k: int) -> tuple[Array, Array, Array]:
    """What platforms may compute otherwise in `set_apart`."""
    places = top_k(scores, k)[1]
    return places, *_split(values, places, scores.shape[1])


def _split(values: Array, places: Array, groups: int) -> tuple[Array, Array]:
    """The values of the groups at these places, and all values with those zero."""
    tokens, n = values.shape
    by_group = values.reshape(tokens, groups, n // groups)
    apart = jnp.take_along_axis(by_group, places[..., None], axis=1)
    others = jnp.where(marked(places, groups)[..., None], jnp.zeros_like(by_group), by_group)
    return apart.reshape(tokens, places.shape[1] * (n // groups)), others.reshape(tokens, n)


def sharded_top_k(scores: Array, k: int, num_shards: int) -> tuple[Array, Array]:
    """The k / num_shards greatest scores of each of so many equal shards of the last axis.

    Shard after shard, each as `top_k` has it; indices are those in the whole axis. k is divisible
    by `num_shards`, and so is the axis.
    """
    if num_shards == 1:
        return top_k(scores, k)
    *lead, n = scores.shape
    size = n // num_shards
    values, places = top_k(scores.reshape(*lead, num_shards, size), k // num_shards)
    places += lax.broadcasted_iota(places.dtype, places.shape, places.ndim - 2) * size
    return values.reshape(*lead, k), places.reshape(*lead, k)


def scatter(values: Array, indices: Array, updates: Array | bool) -> Array:
    """`values` [tokens, n] with updates [tokens, c] at each token's indices."""
    token = jnp.arange(values.shape[0])[:, None]
    return values.at[token, indices].set(updates, mode="promise_in_bounds")


def marked(indices: Array, n: int) -> Array:
    """bool[tokens, n], true at each token's indices: i32[tokens, c]."""
    return scatter(jnp.zeros((indices.shape[0], n), bool), indices, True)


def plain_top_k(scores: Array, k: int) -> tuple[Array, Array]:
    """`lax.top_k`, as a pair."""
    values, indices = lax.top_k(scores, k)
    return values, indices


_KNOWN = (
    *(jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32, jnp.uint32),
    *(jnp.int16, jnp.uint16, jnp.int8, jnp.uint8),
)


def fits_float32(dtype: Any) -> bool:
    """Whether `through_float32` orders such numbers as `lax.top_k` does, NaN and zeros included."""
    return dtype in _KNOWN


def is_narrow_float(dtype: Any) -> bool:
    """Whether float32 holds all such numbers, and they are floats."""
    return dtype in (jnp.float32, jnp.bfloat16, jnp.float16)


def through_float32(select: Select) -> Select:
    """`top_k` of numbers of at most 32 bits, by one of float32 that keeps the order of bits."""

    def run(scores: Array, k: int) -> tuple[Array, Array]:
        dtype = scores.dtype
        if dtype == jnp.float32:
            return select(scores, k)
        if dtype in (jnp.int32, jnp.uint32):
            # The float that has the same place in the order of floats; not its value.
            values, indices = select(from_keys(to_keys(scores), jnp.float32), k)
            return from_keys(to_keys(values), dtype), indices
        values, indices = select(scores.astype(jnp.float32), k)
        return values.astype(dtype), indices

    return run


def _in_stages(scores: Array, k: int) -> tuple[Array, Array]:
    """`lax.top_k` of f32[..., n] on CPU, in one stage or two."""
    n = scores.shape[-1]
    # Both stages together look at n / block + k * block scores.
    block = 1 << max(0, round(math.log2(n / k) / 2))
    if n < _TWO_STAGES or block < 4:
        return _runtime_top_k(scores, k)
    # The k greatest are in the k blocks with the greatest maxima. Whole blocks in the order of
    # their places keep the order of equal scores.
    blocks = -(-n // block)
    if n % block:
        padding = [(0, 0, 0)] * (scores.ndim - 1) + [(0, blocks * block - n, 0)]
        scores = lax.pad(scores, lowest(jnp.float32), padding)
    scores = scores.reshape(*scores.shape[:-1], blocks, block)
    # Maxima of integers: a maximum of floats is NaN for NaN of either sign, and may be either zero.
    maxima = from_keys(to_keys(scores).min(-1), jnp.float32)
    kept = jnp.sort(_runtime_top_k(maxima, k)[1], axis=-1)
    inside = jnp.take_along_axis(scores, kept[..., None], axis=-2, mode="promise_in_bounds")
    values, places = _runtime_top_k(inside.reshape(*kept.shape[:-1], k * block), k)
    origin = jnp.take_along_axis(kept, places // block, axis=-1, mode="promise_in_bounds")
    return values, origin * block + places % block


def _runtime_top_k(scores: Array, k: int) -> tuple[Array, Array]:
    # The barrier makes both results used: otherwise XLA may turn this into a full sort. In their
    # own order they would be one tuple, at which XLA's pass for partitioned programs crashes.
    values, indices = lax.top_k(scores, k)
    indices, values = lax.optimization_barrier((indices, values))
    return values, indices
