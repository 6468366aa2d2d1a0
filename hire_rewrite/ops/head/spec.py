"""What a vocabulary head is made of: its sizes, its arrays, and what its logits go through."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.ops.certify import rounding
from hire_rewrite.ops.encodings import Coarse, Encoding
from hire_rewrite.ops.named_types import exportable
from hire_rewrite.ops.predictors import State
from hire_rewrite.ops.top_k.keys import lowest
from hire_rewrite.ops.top_k.select import sharded_top_k

Endpoints = Callable[[Array], tuple[Array, ...]]
"""Raw logits [tokens, V] to the values that the model goes on with, each [tokens, V] and each
pointwise along V."""


@dataclasses.dataclass(frozen=True)
class HeadSpec:
    """What is to be computed at a head.

    Attributes:
      width: V.
      k: how many of the greatest values are certainly exact.
      candidates: how many rows a token gathers for each endpoint, at least k.
      tail: what values that are not candidates become, `"predicted"` or `"-inf"`.
      out_dtype: of the raw logits.
      precision: of the product, as in `lax.dot_general`.
      compute_dtype: to which rows are cast after they were gathered.
      starts: for each endpoint the row that its first value belongs to; () for 0 everywhere. (An
        endpoint may have fewer than V values: padding of the vocabulary is cut off.)
      certify: how many of the greatest values of each endpoint are proved, at most k; 0 for none.
      rounding: the unit of the arithmetic on the values before they are ranked, for proofs: by so
        little they may differ and be ranked as equal. 0.0 where they are ranked as they are.
      num_shards: the rows are taken as so many equal shards, one behind the other, and of each
        shard the same number are candidates: one shard for each device.
      recall_target: of searches for the greatest values of all devices (see `da_top_k`).
      exact: how the rows are stored; None for as the model has them.
      cast: whether the model's product is of bfloat16 and cast to `out_dtype`: compilers for CPU
        leave that rounding out, others may.
    """

    width: int
    k: int
    candidates: int
    tail: str
    out_dtype: Any
    precision: Any
    compute_dtype: Any
    starts: tuple[int, ...] = ()
    certify: int = 0
    rounding: float = 0.0
    num_shards: int = 1
    recall_target: float = 1.0
    exact: Encoding | None = None
    cast: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.candidates <= self.width:
            raise HireRewriteError(
                f"HeadSpec: k={self.k}, candidates={self.candidates}, width={self.width}: they "
                "must be in that order, and k at least 1"
            )
        if self.tail not in ("predicted", "-inf"):
            raise HireRewriteError(f'HeadSpec: tail={self.tail!r} must be "predicted" or "-inf"')
        least = self.width - (self.num_shards - 1) * self.shard_rows
        if self.candidates % self.num_shards or self.candidates // self.num_shards > least:
            raise HireRewriteError(
                f"HeadSpec: candidates={self.candidates} cannot be taken alike from num_shards="
                f"{self.num_shards} of {self.shard_rows} rows, {self.width} in all: give a "
                f"multiple, and at most {least} for each"
            )
        if not 0 <= self.certify <= self.k:
            raise HireRewriteError(
                f"HeadSpec: certify={self.certify} of k={self.k}: only the k greatest values are "
                "exact, so give at most k, or a greater k"
            )
        if self.certify:
            rounding.check_product(self.compute_dtype, self.out_dtype, self.precision)

    @property
    def shard_rows(self) -> int:
        """The rows of a shard; those behind the last row of the vocabulary are zero."""
        return -(-self.width // self.num_shards)

    @property
    def rows(self) -> int:
        """The rows of all shards together."""
        return self.num_shards * self.shard_rows


@exportable
class HeadState(NamedTuple):
    """The arrays of a head, with a leading axis of layers.

    Attributes:
      rows: [L, spec.rows, d], or what `spec.exact` stores of them.
      predictor: the predictor's; none of its own where it is `Coarse`.
      bound: those of `Certifying.fit_bound`, if the head is certified.
      dense: the rows as the model has them, beside stored ones that were rounded; None where they
        are not held.
    """

    rows: Any
    predictor: State
    bound: State = {}  # noqa: RUF012 - a NamedTuple's default; never changed
    dense: Array | None = None

    def guessing(self, predictor: object) -> State:
        """The arrays that a predictor reads."""
        return self.rows if isinstance(predictor, Coarse) else self.predictor


def best(values: Array, k: int, num_shards: int = 1) -> tuple[Array, Array]:
    """`sharded_top_k`, of all values if there are fewer than k (padding may have been cut off)."""
    short = -values.shape[-1] % num_shards
    if short:
        values = jnp.pad(values, ((0, 0), (0, short)), constant_values=lowest(values.dtype))
    return sharded_top_k(values, min(k, values.shape[-1]), num_shards)
