"""What a site reads, dense and rewritten, and how long that takes on a machine.

Decoding is bound by reading, so a site's time is that of its reads: dense, of its weights;
rewritten, of the predictor's arrays and of the gathered rows, and what choosing them costs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from typing import Any

from hire_rewrite.cost.machine import Machine, whole
from hire_rewrite.graph.nodes import Node
from hire_rewrite.graph.weights import narrow
from hire_rewrite.sites.kind import MatchedSite
from hire_rewrite.sites.operation import Operation


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One call of a site.

    Attributes:
      before, after: the weight bytes that it reads, dense and rewritten.
      dense, rewritten: nanoseconds.
      margin: how many times as fast as dense it has to be expected, to be rewritten.
    """

    before: int
    after: int
    dense: float
    rewritten: float
    margin: float = 1.0

    @property
    def pays(self) -> bool:
        return self.rewritten * self.margin < self.dense

    @property
    def ratio(self) -> float:
        """How many times as fast as dense; 1 where there is nothing to read at all."""
        if self.rewritten == 0:
            return math.inf if self.dense > 0 else 1.0
        return self.dense / self.rewritten


def dense_bytes(site: MatchedSite, without: Collection[Node] = ()) -> int:
    """Bytes of the weights of a site's linear layers, read once in each run, on one device.

    Args:
      without: products that are not counted.
    """
    devices = site.sharding.num_shards
    return site.repeats * sum(
        math.prod(linear.weight.shape) * narrow(linear.weight).dtype.itemsize // devices
        for linear in site.linears
        if linear.node not in without
    )


def estimate(operation: Operation, tokens: Any, machine: Machine) -> Estimate:
    """What an operation saves with `tokens` in a call, on one of its devices.

    A number of tokens that is not known (a symbolic size) is taken for one.
    """
    site, tokens = operation.site, tokens if isinstance(tokens, int) else 1
    reads = operation.reads(tokens)
    experts = site.device_experts
    time = experts * sum(map(machine.time, reads)) + operation.overhead(machine)
    return Estimate(
        dense_bytes(site),
        site.repeats * experts * sum(read.memory for read in reads),
        sum(dense_times(site, tokens, machine)),
        site.repeats * time,
        machine.margin,
    )


def dense_times(site: MatchedSite, tokens: Any, machine: Machine) -> list[float]:
    """Nanoseconds of the dense products of a site's linear layers in one call, loops included."""
    tokens = tokens if isinstance(tokens, int) else 1
    times = []
    for linear in site.linears:
        size = math.prod(linear.weight.shape) // site.sharding.num_shards
        # A matrix that is widened first takes the longer of both times, or, where the compiler
        # does that while reading, the shorter: which, is not known here.
        dtypes = {narrow(linear.weight).dtype, linear.weight.dtype}
        read = min(machine.time(whole(size, dtype, tokens)) for dtype in dtypes)
        times.append(site.repeats * (read + machine.product))
    return times
