"""What one run of an operation read, as far as its data decided that: the counters of telemetry.

An operation says it with a `Usage`, of values that it computes anyway. A `tally` makes numbers of
it that can be added up over calls.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from hire_rewrite.ops.quality import Quality

__all__ = ["FIELDS", "RECALL", "Usage", "picked", "recall_tally", "tally"]

FIELDS = (
    "calls", "tokens", "read", "whole", "whole_tokens", "proved", "sampled", "recalled",
)  # fmt: skip
"""What a tally counts, in order."""

RECALL = 4096
"""What a recall of 1 adds to `recalled`."""


class Usage(NamedTuple):
    """What a run read.

    Attributes:
      read: units that were read one by one: i32[] of all tokens together, or i32[tokens].
      fixed: units that are read besides, whatever the data are.
      whole: bool[], whether it read all units instead; None if it did where a proof failed.
      proved: bool[tokens], tokens whose result was proved; None where nothing is.
    """

    read: Any = 0
    fixed: int = 0
    whole: Any = False
    proved: Array | None = None


def tally(tokens: Any, usage: Usage) -> Array:
    """u32[8], one run of so many tokens: 1 call, its tokens, the units read one by one, whether it
    read all units, its tokens if it did, and the tokens that were proved; nothing was measured.

    Examples:
      >>> tally(3, Usage(read=jnp.array([4, 5, 6]), proved=jnp.array([True, False, True]))).tolist()
      [1, 3, 15, 0, 0, 2, 0, 0]
      >>> tally(3, Usage(read=20, whole=jnp.array(True))).tolist()
      [1, 3, 0, 1, 3, 0, 0, 0]
    """
    read = jnp.asarray(usage.read).sum() + usage.fixed
    proved = 0 if usage.proved is None else usage.proved.sum()
    if usage.whole is None:
        assert usage.proved is not None
        whole = ~usage.proved.all()
    else:
        whole = jnp.asarray(usage.whole)
    numbers = (1, tokens, jnp.where(whole, 0, read), whole, jnp.where(whole, tokens, 0), proved)
    return _row(*numbers, 0, 0)


def recall_tally(measured: Quality) -> Array:
    """u32[8], what was measured of the tokens of a run, besides its `tally`.

    Examples:
      >>> zero, empty = jnp.zeros(()), jnp.zeros(0)
      >>> hits = jnp.array([0.0, 0.0, 1.0, 0.0, 2.0])  # of the top 4 one token has 2, two have all
      >>> seen = Quality(jnp.float32(3), empty, hits, *[zero] * 9)
      >>> recall_tally(seen)[-2:].tolist()
      [3, 10240]
    """
    recalled, k = measured.kept, measured.hits.shape[0] - 1
    if k > 0:
        recalled = measured.hits @ jnp.arange(k + 1.0) / k
    return _row(*(0,) * 6, measured.tokens, jnp.round(RECALL * recalled))


def picked(x: Array, share: float) -> Array:
    """bool[], whether a run with the input x is one of about such a share of runs.

    The input decides, so that nothing has to be remembered between runs.
    """
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32).reshape(-1)
    place = lax.broadcasted_iota(jnp.uint32, bits.shape, 0)
    mixed = ((bits ^ (bits >> 15)) * (2 * place + jnp.uint32(0x9E3779B1))).sum(dtype=jnp.uint32)
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    return (mixed ^ (mixed >> 13)) <= jnp.uint32(round(share * (2**32 - 1)))


def _row(*numbers: Any) -> Array:
    return jnp.stack([jnp.asarray(number).astype(jnp.uint32) for number in numbers])
