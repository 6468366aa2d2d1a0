"""Run a function on batches, have its sites say what they see, and conclude their sizes from it.

A tap stands in the place of each site: it computes what the model computes and reports what it saw.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from hire_rewrite.analyses import Analyses
from hire_rewrite.analysis import Analysis
from hire_rewrite.errors import HireRewriteError
from hire_rewrite.graph.reports import combine
from hire_rewrite.passes.accumulate import accumulate, by_layer
from hire_rewrite.passes.decision import Decision
from hire_rewrite.passes.pack import Calibration
from hire_rewrite.passes.rewrite import rewrite
from hire_rewrite.settings import is_iterable
from hire_rewrite.sharding.rows import automatic
from hire_rewrite.sites.weight_rows import all_finite


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

    Raises:
      HireRewriteError: a batch does not fit the call, no batch reached a site that needs one, or a
        site's inputs hold a NaN or an infinity.
    """
    statistics: Mapping[str, Any] = {}
    if analyses.of(None, args, kwargs).undecided and is_iterable(batches):
        # The sizes first, then what depends on them.
        batches = batches if isinstance(batches, list) else list(batches)
        first = _watch(analyses, args, kwargs, batches, {}, lambda d: d.undecided)
        statistics = first.statistics
    seen = _watch(analyses, args, kwargs, batches, statistics, lambda d: d.packs and d.op.learns)
    calibration = Calibration(seen.sites, {**statistics, **seen.statistics})
    return analyses.of(None, args, kwargs, calibration.statistics), calibration


def _watch(
    analyses: Analyses,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    batches: Iterable[tuple[Any, ...]],
    statistics: Mapping[str, Any],
    chosen: Callable[[Decision], bool],
) -> Calibration:
    """What the batches say about the chosen sites."""
    analysis = analyses.of(None, args, kwargs, statistics)
    decisions = [decision for decision in analysis.decisions if chosen(decision)]
    labels = {decision.site.label for decision in decisions}
    example = [arg for i, arg in enumerate(args) if i not in analyses.weights]

    @functools.cache
    def tapped(analysis: Analysis) -> Any:
        chosen = [d for d in analysis.decisions if d.site.label in labels and d.operation]
        taps = [d.op.observed() for d in chosen]
        return rewrite(analysis.trace, taps)

    def prepare(batch: tuple[Any, ...]) -> tuple[Analysis, Any]:
        full = analyses.joined(args, batch)
        analysis = analyses.of(None, full, kwargs, statistics)
        inputs = analysis.inputs(None, full, kwargs)
        return analysis, {i: inputs[i] for i in tapped(analysis).needs}

    def build(analysis: Analysis) -> Callable[[Any], Any]:
        return lambda inputs: tapped(analysis)(inputs)[1]

    reports = accumulate("calibration batch", batches, example, prepare, build)
    if decisions and reports is None:
        raise HireRewriteError(
            f"{analyses.name}: there is no calibration batch: give a list (a generator that has "
            "run once has none left)"
        )
    return _conclude(decisions, reports or {})


def _conclude(decisions: Sequence[Decision], reports: Mapping[str, Any]) -> Calibration:
    """What the sum of all reports says about sites."""
    sites: dict[str, Any] = {}
    statistics: dict[str, Any] = {}
    for decision in decisions:
        name, report = decision.name, reports.get(decision.name)
        seen = None if report is None else by_layer(report, decision.site)
        if seen is None or not bool(seen[0].count.all()):
            if not decision.op.needs_calibration:
                continue
            raise HireRewriteError(
                f"{name}: no calibration batch reached it: give batches of calls that run it"
            )
        if not bool(all_finite(seen[0])):
            raise HireRewriteError(
                f"{name}: its input holds a NaN or an infinity in the calibration batches: look "
                "at the weights and the batches"
            )
        known = decision.op.statistics(seen)
        if known is not None:
            statistics[decision.site.label] = known
        before = sites.get(decision.packed_name)
        sites[decision.packed_name] = seen if before is None else combine(before, seen)
    return Calibration(jax.tree.map(automatic, sites), statistics)
