"""What one run of an operation read, as far as its data decided that: the counters of telemetry.

An operation says it with a `Usage`, of values that it computes anyway. A `tally` makes numbers of
it that can be added up over calls.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

__all__ = ["FIELDS", "Usage", "tally"]

FIELDS = ("calls", "tokens", "read", "whole", "whole_tokens", "proved")
"""What a tally counts, in order."""


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
    """u32[6], one run of so many tokens: 1 call, its tokens, the units read one by one, whether it
    read all units, its tokens if it did, and the tokens that were proved.

    Examples:
      >>> tally(3, Usage(read=jnp.array([4, 5, 6]), proved=jnp.array([True, False, True]))).tolist()
      [1, 3, 15, 0, 0, 2]
      >>> tally(3, Usage(read=20, whole=jnp.array(True))).tolist()
      [1, 3, 0, 1, 3, 0]
    """
    read = jnp.asarray(usage.read).sum() + usage.fixed
    proved = 0 if usage.proved is None else usage.proved.sum()
    if usage.whole is None:
        assert usage.proved is not None
        whole = ~usage.proved.all()
    else:
        whole = jnp.asarray(usage.whole)
    numbers = (1, tokens, jnp.where(whole, 0, read), whole, jnp.where(whole, tokens, 0), proved)
    return jnp.stack([jnp.asarray(number).astype(jnp.uint32) for number in numbers])
