"""What a site reads, dense and rewritten, and how long that takes on a machine.

Decoding is bound by reading, so a site's time is that of its reads: dense, of its weights;
rewritten, of the predictor's arrays and of the rows that are fetched, and what choosing them
costs. The machine (`hire_rewrite.cost.machine`) says how long each read takes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from hire_rewrite.cost import machine as machines
from hire_rewrite.cost.machine import Machine
from hire_rewrite.learned import Learned
from hire_rewrite.ops.ffn.block import FFNSpec
from hire_rewrite.ops.head.head import HeadSpec
from hire_rewrite.ops.predictors import Predictor, Read, reads_of
from hire_rewrite.passes.detect import Found
from hire_rewrite.sites.ffn.match import FFNMatch
from hire_rewrite.sites.head.match import HeadMatch
from hire_rewrite.sites.weights import narrow

__all__ = ["Estimate", "dense_bytes", "estimate"]


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
        """How many times as fast as dense."""
        return self.dense / self.rewritten


def dense_bytes(found: Found) -> int:
    """Bytes of the weights of a site's linear layers, read once in each run, on one device."""
    return found.repeats * sum(
        math.prod(linear.weight.shape) * narrow(linear.weight).dtype.itemsize // _devices(found)
        for linear in found.match.linears
    )


def estimate(
    found: Found,
    spec: FFNSpec | HeadSpec,
    predictor: Predictor,
    tokens: int,
    learned: Learned | None = None,
    budget: int | None = None,
    machine: Machine | None = None,
) -> Estimate:
    """What rewriting a site saves with `tokens` in a call, on one of its devices.

    Rows of several tokens are counted as calibration found them shared; without it as if they
    shared none, which is what is fetched at most. Where that may be all of a block's rows, or is
    likely to be more than its budget (in groups), it is computed whole.

    Args:
      machine: whose times; None for `machine.current()`.
    """
    machine = machines.current() if machine is None else machine
    if isinstance(spec, FFNSpec):
        assert isinstance(found.match, FFNMatch)
        if _devices(found) > 1:
            budget = None if budget is None else -(-budget // _devices(found))
            spec = spec.part
        reads = _block_reads(found, found.match, spec, predictor, tokens, learned, budget)
        after = _bytes(reads)
    else:
        assert isinstance(found.match, HeadMatch)
        scoring, fetched = _head_reads(found.match, spec, predictor, tokens)
        reads = [*scoring, fetched]
        # Tokens that ask for the same row each fetch it, but not each from memory.
        row = fetched.bytes // fetched.pieces
        after = _bytes(scoring) + row * min(fetched.pieces, spec.part_rows)
    time = found.experts * sum(map(machine.time, reads)) + machine.site
    return Estimate(
        dense_bytes(found),
        found.repeats * found.experts * after,
        found.repeats * _dense_time(found, tokens, machine),
        found.repeats * time,
        machine.margin,
    )


def _block_reads(
    found: Found,
    match: FFNMatch,
    spec: FFNSpec,
    predictor: Predictor,
    tokens: int,
    learned: Learned | None,
    budget: int | None,
) -> list[Read]:
    """What a rewritten block reads, for one expert."""
    up, down = match.linears[0], match.down
    up_dtype, down_dtype = narrow(up.weight).dtype, narrow(down.weight).dtype
    fetched = spec.fetched_groups(tokens, budget)
    union = None if learned is None else learned.fetched(tokens)
    union = None if union is None else -(-union // _devices(found))
    whole = fetched >= spec.groups
    candidates = fetched * spec.group
    if union is not None and not whole:
        whole = union > candidates
        candidates = min(candidates, max(union, spec.candidate_groups * spec.group))
    if whole:
        candidates = spec.width
    kept = min(candidates, tokens * spec.k_groups * spec.group)
    rows = _fetched(candidates, spec, spec.projections * up.in_dim, up_dtype, tokens, whole)
    reads = [rows, _fetched(kept, spec, down.out_dim, down_dtype, tokens, whole)]
    joined = sum(value.shape[match.piece.axis] for value, _ in match.piece.others)
    reads.append(_whole(joined * down.out_dim, down_dtype, tokens))
    parts = (item for sibling in match.region.siblings for item in sibling.projections)
    reads.append(_whole(sum(part.window.size for part in parts) * up.in_dim, up_dtype, tokens))
    reads += reads_of(predictor, spec.scored_rows, up.in_dim, up_dtype, tokens)
    reads.append(Read("scored_float32", 0, scores=tokens * spec.scored_rows))
    return reads


def _fetched(
    neurons: int, spec: FFNSpec, numbers: int, dtype: Any, tokens: int, whole: bool
) -> Read:
    """The rows of so many neurons, of so many numbers each."""
    if whole:
        return _whole(neurons * numbers, dtype, tokens)
    size = neurons * numbers * dtype.itemsize
    return Read(_fetched_kind(dtype), size, tokens, pieces=-(-neurons // spec.group))


def _head_reads(
    match: HeadMatch, spec: HeadSpec, predictor: Predictor, tokens: int
) -> tuple[list[Read], Read]:
    """What scores all rows of a head, and the rows that are fetched."""
    linear = match.linear
    dtype = narrow(linear.weight).dtype
    rows, scored = tokens * (spec.candidates // spec.parts) * len(match.endpoints), spec.part_rows
    scoring = [*reads_of(predictor, scored, linear.in_dim, dtype, tokens)]
    scoring.append(Read("scored_float32", 0, scores=tokens * scored * len(match.endpoints)))
    if spec.certify:  # two norms of each row, in float32
        scoring.append(Read("scored_float32", 8 * spec.width))
    # Each token has rows of its own.
    size = rows * linear.in_dim * dtype.itemsize
    return scoring, Read(_fetched_kind(dtype), size, 1, pieces=rows)


def _dense_time(found: Found, tokens: int, machine: Machine) -> float:
    """Nanoseconds of the products of one run."""
    total = 0.0
    for linear in found.match.linears:
        size = math.prod(linear.weight.shape) // _devices(found)
        # A matrix that is widened first takes the longer of both times, or, where the compiler
        # does that while reading, the shorter: which, is not known here.
        dtypes = {narrow(linear.weight).dtype, linear.weight.dtype}
        total += min(machine.time(_whole(size, dtype, tokens)) for dtype in dtypes)
        total += machine.product
    return total


def _whole(numbers: int, dtype: Any, tokens: int) -> Read:
    """A matrix that the compiler multiplies with."""
    kind = "dense_bfloat16" if _is_half(dtype) else "dense_float32"
    return Read(kind, numbers * dtype.itemsize, tokens)


def _fetched_kind(dtype: Any) -> str:
    return "fetched_bfloat16" if _is_half(dtype) else "fetched_float32"


def _is_half(dtype: Any) -> bool:
    return dtype.itemsize == 2 and jnp.issubdtype(dtype, jnp.floating)


def _bytes(reads: Sequence[Read]) -> int:
    return sum(read.bytes for read in reads)


def _devices(found: Found) -> int:
    """How many devices share a site's rows."""
    return 1 if found.spread is None else found.spread.parts
