"""Calls of the decode step on text of one's own, for `step.pack(..., calibration=streams(...))`."""

from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from ..layers import Cache, CacheSizes, init_cache
from . import text

Prefill = Callable[[Any, Array, Cache], tuple[Any, Cache]]


def streams(
    prefill: Prefill,
    params: Any,
    config: CacheSizes,
    tokens: np.ndarray,
    batch: int,
    length: int,
    first: int | None = None,
) -> Iterator[tuple[Array, Cache]]:
    """What a decode step is called with while it reads tokens: i32[n] in parallel streams.

    The text is cut into streams of `length` tokens, which begin with the token `first` if one is
    given, and `batch` streams are read at a time; the rest is left out. Yields (token: i32[batch],
    cache) at every position. A cache is valid for as long as it is kept: `prefill` reads whole
    streams at once, and all positions share what it remembered. At position t only `pos` says t,
    so that a step overwrites what is at t with the same keys and values, and does not see what
    comes after.
    """
    rows = text.windows(tokens, length, first)
    for start in range(0, len(rows) - batch + 1, batch):
        part = jnp.asarray(rows[start : start + batch])
        _, read = prefill(params, part, init_cache(config, batch, length))
        for t in range(length):
            yield part[:, t], {**read, "pos": jnp.int32(t)}
