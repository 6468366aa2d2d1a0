"""What a rewritten head reads."""

from __future__ import annotations

from hire_rewrite.cost.machine import gathered
from hire_rewrite.graph.weights import narrow
from hire_rewrite.ops.head.spec import HeadSpec
from hire_rewrite.ops.predictors import Predictor, Read, reads_of
from hire_rewrite.sites.head.match import HeadMatch


def head_reads(match: HeadMatch, spec: HeadSpec, predictor: Predictor, tokens: int) -> list[Read]:
    """The reads of one run on one device: all rows' scores, and the rows that are gathered."""
    d, dtype = match.linear.in_dim, narrow(match.linear.weight).dtype
    outputs, rows = len(match.outputs), spec.shard_rows
    reads = [*reads_of(predictor, rows, d, dtype, tokens)]
    reads.append(Read("scored_float32", 0, scores=tokens * rows * outputs))
    if spec.certify:  # two norms of each row, in float32
        reads.append(Read("scored_float32", 8 * spec.width))
    candidates = tokens * (spec.candidates // spec.num_shards) * outputs
    # Each token has rows of its own; what several ask for comes from memory once.
    read = gathered(candidates, candidates * d, dtype, 1)
    distinct = min(candidates, rows) * d * dtype.itemsize
    return [*reads, read._replace(distinct=distinct)]
