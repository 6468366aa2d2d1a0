"""Have the packed sites of a call count what they read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hire_rewrite import _compat
from hire_rewrite.ops.usage import Usage
from hire_rewrite.passes.accumulate import by_layer
from hire_rewrite.passes.decision import Decision
from hire_rewrite.passes.modes import HIRE, Mode, Packing
from hire_rewrite.sites.replacement import SiteReplacement
from hire_rewrite.telemetry import CountedSite, Telemetry, collected


def counting(mode: Mode, share: float) -> Packing:
    """What takes the place of packed sites in a mode, and counts.

    Args:
      share: of runs in which recall is measured.
    """

    def counted(decision: Decision, arrays: Any) -> list[SiteReplacement]:
        if mode is HIRE and decision.rewritten:
            operation = decision.op
            return operation.sampled(arrays, share) if share else operation.counted(arrays)
        site, *others = mode.packed(decision, arrays)
        return [decision.op.tallied(site, Usage(whole=True)), *others]

    return counted


def telemetry(decisions: Sequence[Decision], reports: Mapping[str, Any]) -> Telemetry:
    """The telemetry of a call from the reports of its sites."""
    rows = {}
    for decision in decisions:
        report = _compat.replicated(reports[decision.name])
        report = by_layer(report, decision.site, experts=True)
        rows[decision.name] = report.reshape(-1, report.shape[-1])
    sites = [_counted(decision, rows[decision.name].shape[0]) for decision in decisions]
    return collected(sites, rows)


def _counted(decision: Decision, rows: int) -> CountedSite:
    operation = decision.op
    return CountedSite(
        name=decision.name,
        kind=decision.site.kind.name,
        rows=rows,
        units=operation.counted_units,
        by_call=operation.counted_by_call,
        chooses=operation.chooses,
        proves=operation.proves,
    )
