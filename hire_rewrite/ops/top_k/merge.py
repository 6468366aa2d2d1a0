"""The k greatest of the pairs that all shards of a mesh axis have, on every one of them.

A pair is a value and its global index, as two integers (see `keys`): 8 bytes, or 16 for 64-bit
values. Two ways lead to the same result:

    gather      one all-gather of all lists; (s − 1) q pairs reach each device
    butterfly   rounds in which lists of 1, 2, 4, ... neighbors are merged; each round one
                permutation, and no list is longer than k

Over several axes either all are one, or each is merged before the next one, the last axis first:
where the first axis is slow (hosts), only k pairs cross it. `cheapest` compares them by what they
send and by their rounds.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Sequence

import jax.numpy as jnp
from jax import Array, lax

__all__ = ["MERGES", "Level", "Merge", "cheapest", "described", "first", "merged"]

MERGES = ("gather", "butterfly")

_START, _STEP, _BYTE = 5e-6, 1e-6, 1 / 45e9
"""Seconds that a collective takes to start, that a transfer takes, and that a byte takes on one
link of a TPU v5e. Assumed, not measured: they only have to tell few from many."""

_SLOW = 20
"""How much longer a step and a byte between hosts take. Assumed."""


@dataclasses.dataclass(frozen=True)
class Level:
    """One merge: over the axes `axes` of together `size` shards, in the way `how`.

    With `kept` pairs in each shard's list and k wanted in the end.
    """

    axes: tuple[str, ...]
    size: int
    how: str
    kept: int
    k: int
    slow: bool = False

    @property
    def results(self) -> int:
        """How long the list is afterwards."""
        return min(self.k, self.size * self.kept)

    @property
    def lists(self) -> list[int]:
        """The lengths of the lists that a device receives, one for each round."""
        if self.how == "gather":
            return [(self.size - 1) * self.kept]
        powers = _powers(self.size)
        joined = [power for power in powers if self.size & power]
        return [min(self.k, count * self.kept) for count in powers[:-1] + joined[1:]]

    @property
    def pairs(self) -> int:
        """How many pairs a device receives for each row of values."""
        return sum(self.lists)

    @property
    def steps(self) -> int:
        """Transfers one after the other: a ring passes lists on from neighbor to neighbor."""
        return self.size - 1 if self.how == "gather" else len(self.lists)

    def seconds(self, rows: int, pair_bytes: int) -> float:
        """The model's time for `rows` rows of values."""
        far = _SLOW if self.slow else 1
        transfer = far * (_STEP * self.steps + _BYTE * rows * pair_bytes * self.pairs)
        return _START * len(self.lists) + transfer


Merge = tuple[Level, ...]
"""The merges of all axes, in order."""


def cheapest(
    axes: Sequence[str],
    sizes: Sequence[int],
    kept: int,
    k: int,
    *,
    rows: int = 1,
    pair_bytes: int = 8,
    slow: Collection[str] = (),
    how: str | None = None,
) -> Merge:
    """The merge of lists of `kept` pairs over mesh axes that the model of its cost finds best.

    Args:
      axes, sizes: the axes, the major one first, and their sizes.
      rows: rows of values that are merged together.
      slow: axes whose shards lie on different hosts.
      how: one of `MERGES`, if that is to be used.
    """
    real = [(axis, size) for axis, size in zip(axes, sizes, strict=True) if size > 1]
    if not real:
        return ()
    ways = (how,) if how else MERGES
    groupings = [[[pair] for pair in reversed(real)]]
    if len(real) > 1:
        groupings.append([real])
    candidates = [
        _merge(grouping, chosen, kept, k, slow)
        for grouping in groupings
        for chosen in itertools.product(ways, repeat=len(grouping))
    ]

    def seconds(merge: Merge) -> float:
        return sum(level.seconds(rows, pair_bytes) for level in merge)

    return min(candidates, key=seconds)


def _merge(
    grouping: Sequence[Sequence[tuple[str, int]]],
    ways: Sequence[str],
    kept: int,
    k: int,
    slow: Collection[str],
) -> Merge:
    levels: list[Level] = []
    for axes, how in zip(grouping, ways, strict=True):
        names = tuple(axis for axis, _ in axes)
        size, far = math.prod(size for _, size in axes), any(axis in slow for axis in names)
        levels.append(Level(names, size, how, levels[-1].results if levels else kept, k, far))
    return tuple(levels)


def described(merge: Merge, rows: int, pair_bytes: int = 8) -> str:
    """What a merge of `rows` rows of values sends, for a reader."""
    texts = []
    for level in merge:
        size, rounds = rows * pair_bytes * level.pairs / 1e3, len(level.lists)
        many = f" in {rounds} rounds" if rounds > 1 else ""
        texts.append(f"{level.how} over {' × '.join(level.axes)} ({size:.1f} kB{many})")
    return ", then ".join(texts)


def merged(keys: Array, indices: Array, merge: Merge) -> tuple[Array, Array]:
    """The first pairs of all shards' lists, in order.

    Inside `shard_map` over the axes of `merge`.

    Args:
      keys: [..., kept], of values (`keys.to_keys`); signed integers.
      indices: i32[..., kept], different in all shards; −1 for a pair that is none.

    Returns:
      Both with the last axis as long as the last level's `results`, the same on all shards.
    """
    for level in merge:
        wide = jnp.int64 if keys.dtype == jnp.int64 else jnp.int32
        lists = jnp.stack([keys.astype(wide), indices.astype(wide)])
        lists = _BY[level.how](lists, level)
        keys, indices = lists[0].astype(keys.dtype), lists[1].astype(jnp.int32)
    return keys, indices


def first(keys: Array, indices: Array, k: int) -> tuple[Array, Array]:
    """The first k pairs along the last axis: by key, then by index; those that are none last."""
    order = lax.bitcast_convert_type(indices, jnp.uint32)  # -1 is the greatest
    keys, order = lax.sort((keys, order), dimension=-1, num_keys=2)
    return keys[..., :k], lax.bitcast_convert_type(order[..., :k], jnp.int32)


def _first_of(lists: Array, k: int) -> Array:
    keys, indices = first(lists[0], lists[1].astype(jnp.int32), k)
    return jnp.stack([keys, indices.astype(keys.dtype)])


def _gather(lists: Array, level: Level) -> Array:
    return _first_of(lax.all_gather(lists, level.axes, axis=lists.ndim - 1, tiled=True), level.k)


def _butterfly(lists: Array, level: Level) -> Array:
    """Shard i comes to know the first pairs of the shards i, i + 1, ... (modulo their number).

    The number of shards, in binary, says which of the windows of 1, 2, 4, ... shards to join, so
    that none is counted twice.
    """

    def from_shard(window: Array, ahead: int) -> Array:
        ring = [((i + ahead) % level.size, i) for i in range(level.size)]
        return lax.ppermute(window, level.axes, ring)

    def joined(mine: Array, other: Array) -> Array:
        return _first_of(jnp.concatenate([mine, other], axis=-1), level.k)

    window, known, covered = lists, None, 0
    for power in _powers(level.size):
        if level.size & power:
            known = window if known is None else joined(known, from_shard(window, covered))
            covered += power
        if 2 * power <= level.size:
            window = joined(window, from_shard(window, power))
    assert known is not None
    return known


def _powers(size: int) -> list[int]:
    """The powers of two up to `size`."""
    return [1 << bit for bit in range(size.bit_length())]


_BY = {"gather": _gather, "butterfly": _butterfly}
