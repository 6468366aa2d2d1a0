"""What a rewritten block reads."""

from __future__ import annotations

from hire_rewrite.cost.machine import gathered, whole
from hire_rewrite.graph.weights import narrow
from hire_rewrite.ops.ffn.block import FFNSpec
from hire_rewrite.ops.predictors import Predictor, Read, reads_of
from hire_rewrite.sites.ffn.match import FFNMatch
from hire_rewrite.sites.ffn.statistics import FFNStatistics
from hire_rewrite.sites.kind import MatchedSite


def ffn_reads(
    site: MatchedSite,
    spec: FFNSpec,
    predictor: Predictor,
    tokens: int,
    statistics: FFNStatistics | None,
    budget: int | None,
) -> list[Read]:
    """The reads of one run, for one expert, on one device.

    Rows of several tokens are counted as calibration found them shared; without it as if they
    shared none, which is what is gathered at most. Where that may be all of a block's rows, or is
    likely to be more than its budget (in groups), it is computed whole.
    """
    match: FFNMatch = site.match
    devices = site.sharding.num_shards
    if devices > 1:
        budget = None if budget is None else -(-budget // devices)
        spec = spec.shard
    up, down = match.linears[0], match.down
    up_dtype, down_dtype = narrow(up.weight).dtype, narrow(down.weight).dtype
    groups = spec.gathered_groups(tokens, budget)
    union = None if statistics is None else statistics.gathered(tokens)
    union = None if union is None else -(-union // devices)
    everything = groups >= spec.groups
    candidates = groups * spec.group
    if union is not None and not everything:
        everything = union > candidates
        candidates = min(candidates, max(union, spec.candidate_groups * spec.group))
    if everything:
        candidates = spec.width
    kept = min(candidates, tokens * spec.k_groups * spec.group)

    def rows(neurons: int, numbers: int, dtype: object) -> Read:
        if everything:
            return whole(neurons * numbers, dtype, tokens)
        return gathered(-(-neurons // spec.group), neurons * numbers, dtype, tokens)

    joined = sum(value.shape[match.piece.axis] for value, _ in match.piece.others)
    siblings = (item for sibling in match.region.siblings for item in sibling.projections)
    fused = sum(item.window.size for item in siblings)
    return [
        rows(candidates, spec.projections * up.in_dim, up_dtype),
        rows(kept, down.out_dim, down_dtype),
        whole(joined * down.out_dim, down_dtype, tokens),
        whole(fused * up.in_dim, up_dtype, tokens),
        *reads_of(predictor, spec.scored_rows, up.in_dim, up_dtype, tokens),
        Read("scored_float32", 0, scores=tokens * spec.scored_rows),
    ]
