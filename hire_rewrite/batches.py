"""What is done with batches of arguments: calibrate, and measure."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from hire_rewrite.analysis import Analyses, Analysis
from hire_rewrite.errors import HireRewriteError
from hire_rewrite.learned import Learnings
from hire_rewrite.packed import Packed
from hire_rewrite.passes.calibrate import conclude, tapped
from hire_rewrite.passes.decide import Decision
from hire_rewrite.passes.evaluate import evaluation
from hire_rewrite.passes.observe import add_up
from hire_rewrite.passes.pack import Calibration
from hire_rewrite.passes.summarize import summarize
from hire_rewrite.report import Report
from hire_rewrite.rules import FFN

__all__ = ["calibrate", "measure"]


def calibrate(
    analyses: Analyses,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    batches: Iterable[tuple[Any, ...]],
) -> tuple[Analysis, Calibration]:
    """What the batches say about a call's sites, and the plan that follows from it.

    Args:
      args, kwargs: the call's; weights are arrays.
      batches: tuples of the arguments after the weights.
    """
    learned: Learnings = ()
    if analyses.of(None, args, kwargs).undecided:
        batches = list(batches)  # the sizes first, then what depends on them
        found = _watch(analyses, args, kwargs, batches, learned, lambda d: d.undecided)
        learned = found.learnings
    found = _watch(analyses, args, kwargs, batches, learned, _is_calibrated)
    found = dataclasses.replace(found, learned=dict(learned) | dict(found.learned))
    analysis = analyses.of(None, args, kwargs, found.learnings)
    return analysis, found


def _watch(
    analyses: Analyses,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    batches: Iterable[tuple[Any, ...]],
    learned: Learnings,
    chosen: Callable[[Decision], bool],
) -> Calibration:
    """What the batches say about the chosen sites."""

    def prepare(batch: tuple[Any, ...]) -> tuple[Analysis, Any]:
        full = analyses.joined(args, batch)
        analysis = analyses.of(None, full, kwargs, learned)
        inputs = analysis.inputs(None, full, kwargs)
        return analysis, {i: inputs[i] for i in build(analysis).needs}

    @functools.cache
    def build(analysis: Analysis) -> Any:
        sites = [d for d in analysis.decisions if d.found.name in names]
        return tapped(analysis.trace, sites)

    analysis = analyses.of(None, args, kwargs, learned)
    decisions = [decision for decision in analysis.decisions if chosen(decision)]
    names = {decision.found.name for decision in decisions}
    example = [arg for i, arg in enumerate(args) if i not in analyses.weights]

    def run(analysis: Analysis) -> Callable[[Any], Any]:
        taps = build(analysis)
        return lambda inputs: taps(inputs)[1]

    reports = add_up("calibration batch", batches, example, prepare, run)
    return conclude(analysis.trace, decisions, reports)


def measure(
    analyses: Analyses,
    packed: Packed,
    batches: Iterable[tuple[Any, ...]],
    targets: Callable[..., Any] | None,
    kwargs: Mapping[str, Any],
    *,
    sites_only: bool,
) -> Report:
    """Run batches and report what sites miss; the arguments are those of `evaluate`.

    Args:
      sites_only: leave out the model, and have all sites see what the exact model computes.
    """
    given = dict.fromkeys(analyses.weights[1:]) | dict.fromkeys(analyses.weights[:1], packed)
    kinds: list[Analysis] = []

    def prepare(batch: tuple[Any, ...]) -> tuple[Analysis, Any]:
        args = analyses.joined(given, batch)
        analysis = analyses.of(packed, args, kwargs)
        kinds.append(analysis)
        known = analysis.inputs(packed, analyses.without_weights(tuple(args), packed), kwargs)
        wanted = None if targets is None else jnp.asarray(targets(*batch)).reshape(-1)
        return analysis, (packed, known, wanted)

    def build(analysis: Analysis) -> Callable[[Any], Any]:
        return evaluation(
            analysis.trace, analysis.decisions, analysis.replacements, sites_only=sites_only
        )

    total = add_up("evaluation batch", batches, None, prepare, build)
    if total is None:
        raise HireRewriteError(f"{analyses.name}: no batches to evaluate on: give at least one")
    return summarize(kinds[0].trace, kinds[0].packing, total)


def _is_calibrated(decision: Decision) -> bool:
    """Whether calibration tells anything about a site."""
    rule = decision.site.rule
    if rule is None or not decision.packs:
        return False
    return isinstance(rule, FFN) or rule.predictor.wants_calibration
