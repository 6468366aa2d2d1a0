"""From sums over tokens to the figures that a user reads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hire_rewrite.cost import machine as machines
from hire_rewrite.cost.estimate import estimate
from hire_rewrite.cost.machine import Machine
from hire_rewrite.errors import HireRewriteError
from hire_rewrite.passes.accumulate import by_layer
from hire_rewrite.passes.decision import Decision
from hire_rewrite.report import ModelReport, Report, SiteReport
from hire_rewrite.sites import Operation

_CURVE = 40
"""Points of a recall curve."""


def summarize(calls: Sequence[Sequence[Decision]], total: Mapping[str, Any]) -> Report:
    """The report of the sums of `evaluate`.

    Args:
      calls: the packed sites of the call of each batch.
    """
    sums = total["sites"]
    measured = [decision for decision in calls[0] if decision.name in sums]
    sites = tuple(_site(decision, sums[decision.name]) for decision in measured)
    dense = dict.fromkeys(d.name for call in calls for d in call if not d.rewritten)
    model = None if "model" not in total else _model(total["model"])
    return Report(sites, model, tuple(dense))


def _site(decision: Decision, sums: Any) -> SiteReport:
    site, operation = decision.site, decision.op
    sums = by_layer(sums, site, experts=True)
    sums = type(sums)(*(np.asarray(leaf, np.float64) for leaf in sums))
    if not sums.tokens.all():
        raise HireRewriteError(
            f"{site.name}: no evaluation batch reached it: give batches of calls that run it"
        )
    tokens = sums.tokens
    machine = machines.current()
    now = estimate(operation, 1, machine)
    choice = _choice(operation, sums, machine)
    if choice is None:  # what is not chosen is not missed, but for what a guess takes for zero
        kept = (sums.kept / tokens) if operation.reads_vary else np.ones(len(tokens))
        recall = tuple(map(float, kept))
        choice = {"k": 0, "candidates": 0, "recall": recall, "recall_p1": recall}
        choice |= {"curve": ((0, now.after, recall),), "best": 1.0, "mass": 1.0}

    def mean(sums: Any) -> float:
        return float(sums.sum() / tokens.sum())

    return SiteReport(
        name=site.name,
        kind=site.kind.name,
        tokens=int(tokens.max()),
        error=mean(sums.error),
        error_exact=mean(sums.error_exact),
        proved=mean(sums.proved) if operation.proves else None,
        read=tuple(map(float, sums.read / tokens)) if operation.reads_vary else None,
        whole=mean(sums.whole) if operation.reads_vary else None,
        bytes_dense=now.before,
        bytes_read=now.after,
        **({"best": mean(sums.best), "mass": mean(sums.mass)} | choice),
    )


def _choice(operation: Operation, sums: Any, machine: Machine) -> dict[str, Any] | None:
    """What a site's predictor misses, as fields of `SiteReport`; None if it chooses nothing."""
    tokens, units = sums.tokens[:, None], sums.places.shape[1]
    if not units:
        return None
    # A vocabulary may be cut to fewer rows than are asked for.
    k, candidates = sums.hits.shape[1] - 1, min(operation.candidates, units)
    # Slots of the top k that hold nothing are never missed.
    empty = tokens * k - sums.places.sum(1, keepdims=True)
    within = (np.cumsum(sums.places, 1) + empty) / (tokens * k)
    curve = []
    for count in _counts(max(k, operation.fixed_units), candidates, units):
        size = estimate(operation.with_candidates(count), 1, machine).after
        curve.append((count, size, tuple(map(float, within[:, count - 1]))))
    recall = sums.hits @ np.arange(k + 1) / (tokens[:, 0] * k)
    percentile = (np.cumsum(sums.hits, 1) >= 0.01 * tokens).argmax(1) / k
    return {
        "k": k,
        "candidates": candidates,
        "recall": tuple(map(float, recall)),
        "recall_p1": tuple(map(float, percentile)),
        "curve": tuple(curve),
    }


def _counts(least: int, candidates: int, units: int) -> list[int]:
    """Numbers of candidates for a curve: the site's own, twice as many, and others around them."""
    some = {round(float(count)) for count in np.geomspace(least, units, _CURVE)}
    return sorted(some | {candidates, min(2 * candidates, units)})


def _model(sums: Any) -> ModelReport:
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
