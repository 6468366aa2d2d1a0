"""A feed-forward block as the operations see it: sizes, what ranks its neurons, and its arrays.

A neuron is a row of the first matrix (of two in a gated block) and a row of the second. Neurons
are chosen and gathered in groups, whose rows lie together in memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from jax import Array

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.ops.named_types import exportable
from hire_rewrite.ops.predictors import State

Activation = Callable[[tuple[Array, ...], tuple[Array, ...]], Array]
"""(pre: P arrays [tokens, n], vectors: arrays [n]) to h: [tokens, n], pointwise along n."""


def check_criterion(owner: str, criterion: object) -> None:
    """Raise HireRewriteError if a spec or rule ranks neurons by something that is not known."""
    if criterion not in ("hidden", "output"):
        raise HireRewriteError(f'{owner}: criterion={criterion!r} must be "hidden" or "output"')


@dataclasses.dataclass(frozen=True)
class ProductSpec:
    """How a block multiplies.

    Attributes:
      up_dtype, down_dtype: results of the two matmuls.
      precision: of both, as in `lax.dot_general`.
      compute_dtype: to which rows are cast after they were gathered.
    """

    up_dtype: Any
    down_dtype: Any
    precision: Any
    compute_dtype: Any


@dataclasses.dataclass(frozen=True)
class FFNSpec(ProductSpec):
    """What is to be computed at a block (see `ProductSpec` too).

    Attributes:
      width: f, the number of neurons.
      group: neurons that are chosen and gathered together; divides the width.
      projections: P, first matrices: 1 in a plain block, 2 in a gated one.
      k_groups: how many of the G = f / group groups count.
      candidate_groups: how many a token computes exactly, at least k_groups.
      gate: the projection that goes through the activation.
      sparse: whether a non-positive gate makes h exactly zero (ReLU family).
      gate_bias: the vector that is added to the gate first, or None.
      selects: whether the activation itself looks at all neurons together and zeroes most; then it
        is given the guesses of those that were not gathered.
      keeps_all: whether all that it selects is kept, where ties make it more than k too (for groups
        of one neuron).
      criterion: what a neuron is ranked by: |h| (`"hidden"`), or |h| times the norm of the neuron's
        second row (`"output"`). A group is ranked by the root of the sum of its squares.
      common_groups: the first so many groups are always computed, without prediction.
      num_shards: the neurons are taken as so many equal shards, one behind the other, and of each
        shard the same number are candidates and are kept: one shard for each device.
    """

    width: int
    group: int
    projections: int
    k_groups: int
    candidate_groups: int
    gate: int = 0
    sparse: bool = False
    gate_bias: int | None = None
    selects: bool = False
    keeps_all: bool = False
    criterion: str = "hidden"
    common_groups: int = 0
    num_shards: int = 1

    def __post_init__(self) -> None:
        if self.group < 1 or self.width % self.group:
            raise HireRewriteError(
                f"FFNSpec: group={self.group} must divide the width {self.width}"
            )
        if not 1 <= self.k_groups <= self.candidate_groups <= self.groups:
            raise HireRewriteError(
                f"FFNSpec: k_groups={self.k_groups}, candidate_groups={self.candidate_groups}, "
                f"{self.groups} groups: they must be in that order, and k_groups at least 1"
            )
        if not 0 <= self.common_groups <= self.candidate_groups:
            raise HireRewriteError(
                f"FFNSpec: common_groups={self.common_groups} are among the candidates, so give "
                f"at most candidate_groups={self.candidate_groups}"
            )
        if not 0 <= self.gate < self.projections:
            raise HireRewriteError(
                f"FFNSpec: gate={self.gate} is not among {self.projections} projections"
            )
        shared = (self.groups, self.k_groups, self.candidate_groups)
        if any(count % self.num_shards for count in shared):
            raise HireRewriteError(
                f"FFNSpec: num_shards={self.num_shards} must divide the {self.groups} groups, "
                f"k_groups={self.k_groups} and candidate_groups={self.candidate_groups}"
            )
        if self.num_shards > 1 and (self.common_groups or self.selects):
            raise HireRewriteError(
                f"FFNSpec: num_shards={self.num_shards} with common groups, or with an activation "
                "that selects, are not supported: give num_shards=1"
            )
        check_criterion("FFNSpec", self.criterion)

    @property
    def shard(self) -> FFNSpec:
        """What is to be computed of one shard."""
        return dataclasses.replace(
            self,
            width=self.width // self.num_shards,
            k_groups=self.k_groups // self.num_shards,
            candidate_groups=self.candidate_groups // self.num_shards,
            num_shards=1,
        )

    @property
    def groups(self) -> int:
        """G."""
        return self.width // self.group

    @property
    def scored_rows(self) -> int:
        """How many pre-activations the predictor guesses."""
        return self.projections * (self.groups - self.common_groups) * self.group

    def gathered_groups(self, tokens: int, budget: int | None = None) -> int:
        """How many groups `tokens` tokens fetch together, at most; `budget` bounds it further."""
        worst = self.common_groups + tokens * (self.candidate_groups - self.common_groups)
        least = self.candidate_groups
        return min(self.groups, worst, self.groups if budget is None else max(budget, least))


@exportable
class SiblingState(NamedTuple):
    """What is left of a matrix that holds a block's first one too, and is read elsewhere.

    Attributes:
      rows: for each projection [L, n, d_in].
      vectors: of [L, n], numbers that belong to them.
    """

    rows: tuple[Array, ...]
    vectors: tuple[Array, ...]


@exportable
class FFNState(NamedTuple):
    """The arrays of a block; neuron j is number j % group of group j // group.

    Attributes:
      up: [L, G, P, group, d_in], the rows of the first matrices.
      down: [L, G, group, d_out], those of the second.
      vectors: of [L, G, group], numbers that the activation needs of each neuron, such as biases.
      predictor: for the rows of all projections, without those of the common groups: shard by
        shard, all of the first projection, then all of the next; with the same leading axis.
      fused: its siblings in a fused matrix, which are computed whole.
      joined: of [L, n, d_out], rows of the last matrix that other inputs than h are for.
      norms: f32[L, G, group], norms of the second rows, for the criterion `"output"` alone.
    """

    up: Array
    down: Array
    vectors: tuple[Array, ...]
    predictor: State
    fused: tuple[SiblingState, ...] = ()
    joined: tuple[Array, ...] = ()
    norms: Array | None = None
