"""Weight bytes that a site reads, dense and rewritten: decoding is bound by them."""

from __future__ import annotations

import dataclasses
import math

from hire_rewrite.learned import Learned
from hire_rewrite.ops.block import FFNSpec
from hire_rewrite.ops.head import HeadSpec
from hire_rewrite.ops.predictors import Predictor
from hire_rewrite.passes.detect import Found
from hire_rewrite.passes.weights import narrow
from hire_rewrite.patterns.ffn import FFNMatch

__all__ = ["Bytes", "estimate"]


@dataclasses.dataclass(frozen=True)
class Bytes:
    """Bytes in one call."""

    before: int
    after: int

    @property
    def pays(self) -> bool:
        return self.after < self.before


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
) -> Bytes:
    """What rewriting a site saves with `tokens` in a call, on one of its devices.

    Rows of several tokens are counted as calibration found them shared; without it as if they
    shared none, which is what is fetched at most. Where that may be all of a block's rows, or is
    likely to be more than its budget (in groups), it is computed whole.
    """
    match, devices = found.match, _devices(found)
    if isinstance(match, FFNMatch):
        assert isinstance(spec, FFNSpec)
        if devices > 1:
            budget = None if budget is None else -(-budget // devices)
            spec = spec.part
        up, down = match.linears[0], match.down
        up_dtype, down_dtype = narrow(up.weight).dtype, narrow(down.weight).dtype
        fetched = spec.fetched_groups(tokens, budget)
        union = None if learned is None else learned.fetched(tokens)
        union = None if union is None else -(-union // devices)
        whole = fetched >= spec.groups
        candidates = fetched * spec.group
        if union is not None and not whole:
            whole = union > candidates
            candidates = min(candidates, max(union, spec.candidate_groups * spec.group))
        if whole:
            candidates = spec.width
        kept = min(candidates, tokens * spec.k_groups * spec.group)
        rows = candidates * spec.projections * up.in_dim * up_dtype.itemsize
        rows += kept * down.out_dim * down_dtype.itemsize
        rows += sum(value.shape[match.piece.axis] for value, _ in match.piece.others) * (
            down.out_dim * down_dtype.itemsize
        )
        parts = (item for sibling in match.region.siblings for item in sibling.projections)
        rows += sum(part.window.size for part in parts) * up.in_dim * up_dtype.itemsize
        scoring = predictor.bytes(spec.scored_rows, up.in_dim, up_dtype, tokens)
    else:
        assert isinstance(spec, HeadSpec)
        linear = match.linear
        dtype = narrow(linear.weight).dtype
        each = spec.candidates // spec.parts
        rows = min(spec.part_rows, tokens * each * len(match.endpoints))
        rows *= linear.in_dim * dtype.itemsize
        scoring = predictor.bytes(spec.part_rows, linear.in_dim, dtype, tokens)
        if spec.certify:  # two norms of each row, in float32
            scoring += 8 * spec.width
    return Bytes(dense_bytes(found), found.repeats * found.experts * (scoring + rows))


def _devices(found: Found) -> int:
    """How many devices share a site's rows."""
    return 1 if found.spread is None else found.spread.parts
