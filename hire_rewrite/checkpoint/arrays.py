"""Arrays as checkpoints hold them, and copies of them on the host."""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hire_rewrite.errors import HireRewriteError


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array in a checkpoint: `crc32` of its bytes, None where no process had all of them."""

    name: str
    shape: tuple[int, ...]
    dtype: Any
    crc32: int | None = None

    def check(self, array: np.ndarray, where: str) -> None:
        """Raise HireRewriteError if an array on the host has other bytes."""
        if self.crc32 is not None and checksum(array) != self.crc32:
            raise HireRewriteError(
                f"{where}: {self.name} is damaged: its checksum is another one. Copy the "
                "checkpoint again, or pack again from the weights"
            )


def on_host(array: jax.Array) -> np.ndarray:
    """The numbers of an array. The array keeps no copy for later, as `np.asarray` has it."""
    if len(array.devices()) == 1:
        return np.ascontiguousarray(np.asarray(array.addressable_data(0)))
    whole = np.empty(array.shape, array.dtype)
    for place, shard in enumerate(array.addressable_shards):
        if shard.replica_id == 0:
            whole[shard.index] = np.asarray(array.addressable_data(place))
    return whole


def checksum(array: np.ndarray) -> int:
    """The CRC-32 of an array's bytes in row-major order."""
    return zlib.crc32(as_bytes(array))


def as_bytes(array: np.ndarray) -> memoryview:
    """The bytes of a contiguous array, of any dtype; no copy."""
    return array.reshape(-1).view(np.uint8).data


def on_devices(array: np.ndarray, sharding: Any) -> jax.Array:
    """An array on the host, which nobody else writes to, where it belongs; None for the default."""
    if sharding is None:
        return jnp.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
