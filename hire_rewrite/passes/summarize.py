"""From sums over tokens to the figures that a user reads."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hire_rewrite.cost.estimate import estimate
from hire_rewrite.errors import HireRewriteError
from hire_rewrite.ops.ffn.block import FFNSpec
from hire_rewrite.ops.head.head import HeadSpec
from hire_rewrite.passes.decide import Decision
from hire_rewrite.passes.observe import by_layer
from hire_rewrite.passes.trace import Trace
from hire_rewrite.report import ModelReport, Report, SiteReport
from hire_rewrite.sites.weights import site_loops

__all__ = ["summarize"]

_CURVE = 40
"""Points of a recall curve."""


def summarize(trace: Trace, decisions: Sequence[Decision], total: Mapping[str, Any]) -> Report:
    """The report of the sums of `evaluate`."""
    sites = [
        _site(trace, d, total["sites"][d.found.name])
        for d in decisions
        if d.found.name in total["sites"]
    ]
    return Report(tuple(sites), _model(total["model"]))


def _site(trace: Trace, decision: Decision, sums: Any) -> SiteReport:
    found, spec, rule = decision.found, decision.spec, decision.site.rule
    assert spec is not None
    assert rule is not None
    loops = site_loops(trace, found.match)
    seen = by_layer(sums, loops, found.shards, found.experts)
    seen = type(seen)(*(np.asarray(leaf, np.float64) for leaf in seen))
    if not seen.tokens.all():
        raise HireRewriteError(
            f"{found.name}: no evaluation batch reached it: give batches of calls that run it"
        )
    tokens = seen.tokens
    # A vocabulary may be cut to fewer rows than are asked for.
    k, units = seen.hits.shape[1] - 1, seen.places.shape[1]
    candidates = spec.candidate_groups if isinstance(spec, FFNSpec) else spec.candidates
    candidates = min(candidates, units)
    found_units = seen.hits @ np.arange(k + 1) / (tokens * k)
    percentile = (np.cumsum(seen.hits, 1) >= 0.01 * tokens[:, None]).argmax(1) / k
    # Slots of the top k that hold nothing are never missed.
    empty = tokens[:, None] * k - seen.places.sum(1, keepdims=True)
    within = (np.cumsum(seen.places, 1) + empty) / (tokens[:, None] * k)
    curve = []
    least = max(k, spec.common_groups if isinstance(spec, FFNSpec) else 1)
    for count in _counts(least, candidates, units):
        other: FFNSpec | HeadSpec
        each = -(-count // spec.parts) * spec.parts
        if isinstance(spec, FFNSpec):
            other = dataclasses.replace(spec, candidate_groups=each)
        else:
            other = dataclasses.replace(spec, k=min(spec.k, count), candidates=each)
        size = estimate(found, other, rule.predictor, 1).after
        curve.append((count, size, tuple(map(float, within[:, count - 1]))))
    now = estimate(found, spec, rule.predictor, 1)
    certified = getattr(spec, "certify", 0) > 0
    return SiteReport(
        name=found.name,
        kind=found.kind,
        tokens=int(seen.tokens.max()),
        k=k,
        candidates=candidates,
        recall=tuple(map(float, found_units)),
        recall_p1=tuple(map(float, percentile)),
        best=float(seen.best.sum() / tokens.sum()),
        mass=float(seen.mass.sum() / tokens.sum()),
        error=float(seen.error.sum() / tokens.sum()),
        cost=float(seen.cost.sum() / tokens.sum()),
        proved=float(seen.proved.sum() / tokens.sum()) if certified else None,
        bytes_dense=now.before,
        bytes_read=now.after,
        curve=tuple(curve),
    )


def _counts(least: int, candidates: int, units: int) -> list[int]:
    """Numbers of candidates for a curve: the site's own, twice as many, and others around them."""
    some = {round(float(count)) for count in np.geomspace(least, units, _CURVE)}
    return sorted(some | {candidates, min(2 * candidates, units)})


def _model(sums: Any) -> ModelReport | None:
    if sums is None:
        return None
    tokens = max(float(sums.tokens), 1.0)
    perplexity = None
    if float(sums.targets) > 0:
        dense, exact, hire = (_exp(float(x) / float(sums.targets)) for x in sums.nll)
        perplexity = (dense, exact, hire)
    return ModelReport(
        tokens=int(sums.tokens),
        agreement=float(sums.agree) / tokens,
        agreement_exact=float(sums.agree_exact) / tokens,
        kl=float(sums.kl) / tokens,
        kl_exact=float(sums.kl_exact) / tokens,
        perplexity=perplexity,
    )


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
