"""A fingerprint of arrays: cheap, and another one after an update."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from hire_rewrite import _compat
from hire_rewrite.sharding.rows import automatic, packing_context

SAMPLES = 2048
"""Numbers of each array that are looked at. A step of an optimizer changes nearly all; in bfloat16
a small one changes some in a hundred. That none of so many random ones is among one in a hundred of
an array's numbers has a probability of 1e-9."""

_EACH = 16
"""Numbers of each matrix in a stack (of layers, of experts), where that is more."""


def fingerprint(arrays: Iterable[Any]) -> tuple[int | None, ...]:
    """A checksum of some numbers of each array; the same however it is sharded.

    None stands for what holds no numbers to sample: a `jax.Ref`, or keys of random numbers.

    Examples:
      >>> import jax.numpy as jnp
      >>> before, after = jnp.arange(1000.0), jnp.arange(1000.0) * 0.999
      >>> fingerprint([before]) == fingerprint([after])
      False
    """
    return tuple(map(_checksum, arrays))


def _checksum(array: Any) -> int | None:
    aval = jax.typeof(array)
    if _compat.is_ref(aval) or jnp.issubdtype(aval.dtype, jax.dtypes.extended):
        return None
    sampled = _sampled(array).astype(aval.dtype)
    return zlib.crc32(np.ascontiguousarray(sampled).tobytes())


def _sampled(array: Any) -> np.ndarray:
    """The numbers of an array at `_places`. No copy of it is made."""
    if not isinstance(array, jax.Array):
        numbers = np.asarray(array)
        return numbers[_places(numbers.shape)]
    if array.is_fully_addressable and {d.platform for d in array.devices()} == {"cpu"}:
        return _of_shards(array)
    with packing_context([array]):  # the mesh in use may have types that say how arrays are sharded
        array = automatic(array)
        over_mesh = isinstance(array.sharding, NamedSharding)
        replicated = NamedSharding(array.sharding.mesh, PartitionSpec()) if over_mesh else None
        return np.asarray(_sampler(replicated)(array))


def _of_shards(array: jax.Array) -> np.ndarray:
    """`_sampled` where all numbers are in this process' memory: nothing is compiled."""
    places = _places(array.shape)
    found = np.empty(len(places[0]) if places else (), array.dtype)
    for number, shard in enumerate(array.addressable_shards):
        if shard.replica_id:
            continue
        ends = [part.indices(n)[:2] for part, n in zip(shard.index, array.shape, strict=True)]
        inside = [(lo <= at) & (at < hi) for at, (lo, hi) in zip(places, ends, strict=True)]
        here = np.logical_and.reduce(inside) if inside else ()
        own = tuple(at[here] - lo for at, (lo, _) in zip(places, ends, strict=True))
        # Another object with the same buffer: a view that the array itself kept would hold the
        # buffer, which could then not be donated any more.
        found[here] = np.asarray(array.addressable_data(number))[own]
    return found


@functools.cache
def _sampler(sharding: NamedSharding | None) -> Any:
    """`_sampled` on the device, compiled once for weights that are alike."""
    return jax.jit(lambda array: array[_places(array.shape)], out_shardings=sharding)


def _places(shape: Sequence[int]) -> tuple[np.ndarray, ...]:
    """Places in an array of this shape, by axis: as many in each matrix of a stack, at random.

    Equal steps would meet some columns, and never others, where the row length is in resonance
    with them.
    """
    size = math.prod(shape)
    if not shape or not size:
        return tuple(np.zeros(0, np.int64) for _ in shape)
    stack = math.prod(shape[:-2])
    count, block = max(SAMPLES, _EACH * stack), size // stack
    if size <= count:
        return np.unravel_index(np.arange(size), shape)
    number = np.arange(count)
    inside = _random(number) % np.uint64(block)
    return np.unravel_index(number * stack // count * block + inside.astype(np.int64), shape)


def _random(number: np.ndarray) -> np.ndarray:
    """A random number of 64 bits for each number, always the same: SplitMix64."""
    mixed = (number.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ mixed >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ mixed >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return mixed ^ mixed >> np.uint64(31)
