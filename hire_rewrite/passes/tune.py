"""Choose for each site the predictor and the candidates that read least and recall enough."""

from __future__ import annotations

import itertools
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from hire_rewrite.analyses import Analyses
from hire_rewrite.errors import HireRewriteError
from hire_rewrite.ops.predictors import Predictor
from hire_rewrite.passes.accumulate import Numbered
from hire_rewrite.passes.calibrate import calibrate
from hire_rewrite.passes.evaluate import evaluate
from hire_rewrite.report import SiteReport
from hire_rewrite.rules import Rule
from hire_rewrite.settings import is_iterable
from hire_rewrite.sites import Operation
from hire_rewrite.tuned import Trial, Tuned, portable

_MARGIN = 0.5
"""The part of the misses allowed that may be used up on the held-out batches. The rest is left for
text of other kinds, on which fitted predictors miss more."""

_RANKS = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 1 / 3)
"""Ranks that are tried, as parts of d."""


def _ranks(operation: Operation, tokens: int) -> list[int]:
    """The ranks that are worth a trial at a site that is calibrated on so many tokens."""
    n, d = operation.scored
    ranks = sorted({max(8, round(d * share / 8) * 8) for share in _RANKS})
    return [rank for rank in ranks if rank <= min(n, d, tokens)]


def choose(
    sites: Sequence[Operation],
    recall: float,
    tokens: int,
    measure: Callable[[Sequence[Rule]], Sequence[SiteReport]],
) -> tuple[list[Trial], list[Trial]]:
    """The best trial of each site, and all trials.

    Args:
      recall: the share of the true top k that each layer of a site must find, on average.
      tokens: how many the predictors are calibrated on.
      measure: rules, one for each of some sites, to what the held-out batches say about them.
    """
    target = 1.0 - (1.0 - recall) * _MARGIN
    options = [[_rule(op, p) for p in _predictors(op, tokens)] for op in sites]
    trials: list[list[Trial]] = [[] for _ in sites]
    for rules in itertools.zip_longest(*options):
        reports = {report.name: report for report in measure([rule for rule in rules if rule])}
        for op, rule, tried in zip(sites, rules, trials, strict=True):
            if rule and op.site.name in reports:
                tried.append(_trial(op, rule, reports[op.site.name], target))
    chosen = [min(tried, key=lambda trial: trial.bytes) for tried in trials if tried]
    return chosen, [trial for tried in trials for trial in tried]


def _rule(operation: Operation, predictor: Predictor | None) -> Rule:
    """The rule of a trial, for the site alone."""
    name = operation.site.name
    return operation.tuned_rule().for_site(name, predictor=predictor, force=True)


def _predictors(operation: Operation, tokens: int) -> list[Predictor]:
    """Those that are tried; where nothing is chosen recall says nothing, and the rule's stays."""
    own = operation.predictor
    if own is not None and not operation.candidates:
        return [own]
    return operation.predictors(_ranks(operation, tokens))


def _trial(operation: Operation, rule: Rule, report: SiteReport, target: float) -> Trial:
    enough = (point for point in report.curve if min(point[2]) >= target)
    # All units are candidates at the end of the curve, and nothing is missed.
    candidates, size, recalls = next(enough, report.curve[-1])
    settled = rule.replace(force=operation.rule.force)
    if operation.candidates:
        settled = settled.replace(candidates=candidates * operation.unit)
    return Trial(operation.site.name, settled, size, min(recalls))


def held_out(batches: Iterable[tuple[Any, ...]]) -> tuple[Numbered, Numbered]:
    """Batches to fit predictors to, and others to measure them on: every fourth, or the last."""
    every = list(batches) if is_iterable(batches) else []
    for number, batch in enumerate(every):
        if not isinstance(batch, tuple):
            raise HireRewriteError(
                f"tune: batch {number} is a {type(batch).__name__}: give a list of tuples, each of "
                "the arguments after the weights"
            )
    if len(every) < 2:
        raise HireRewriteError(
            f"tune: {len(every)} batch(es): give at least 2, since a part is held out to measure "
            "(and a generator that has run once has none left)"
        )
    out = [i for i in range(len(every)) if i % 4 == 3] or [len(every) - 1]
    return Numbered(every, (i for i in range(len(every)) if i not in out)), Numbered(every, out)


def tune(
    analyses: Analyses,
    weights: Any,
    batches: Iterable[tuple[Any, ...]],
    recall: float,
    kwargs: Mapping[str, Any],
) -> Tuned:
    """The rules that `Transformed.tune` returns."""
    if not isinstance(recall, numbers.Real) or not 0.0 < recall < 1.0:
        raise HireRewriteError(f"tune: recall={recall!r} must be between 0 and 1")
    fitting, other = held_out(batches)
    given = dict(zip(analyses.weights, analyses.weight_arguments(weights), strict=True))
    args = analyses.joined(given, fitting[0])
    decisions = analyses.of(None, args, kwargs).decisions
    sites = [d.operation for d in decisions if d.operation and d.operation.predictor]
    if not sites:
        raise HireRewriteError(
            f"tune: no rule asks for a site of {analyses.name}: look at .plan(...)"
        )
    calls = (analyses.of(None, analyses.joined(given, batch), kwargs) for batch in fitting)
    tokens = sum(min(decision.site.tokens for decision in call.decisions) for call in calls)
    probes = tuple(_rule(op, op.probe_predictor()) for op in sites)
    _, calibration = calibrate(analyses.again(probes), args, kwargs, fitting)

    def measure(rules: Sequence[Rule]) -> Sequence[SiteReport]:
        again = analyses.again(tuple(rules))
        analysis = again.of(None, args, kwargs, calibration.statistics)
        leaves = jax.tree.leaves([args[i] for i in analyses.weights])
        packed = analysis.pack(leaves, calibration)
        return evaluate(again, packed, other, leaves, None, kwargs, sites_only=True).sites

    names = [decision.name for decision in decisions]
    chosen, trials = (portable(some, names) for some in choose(sites, recall, tokens, measure))
    # Default rules spare blocks that are not sparse; written out they would not.
    return Tuned((*(trial.rule for trial in chosen), *analyses.rules), chosen, trials)
