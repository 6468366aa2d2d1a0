"""What calibration asks of a function's sites, and what is concluded from it.

A tap stands in the place of a head's product: it computes the product as it was, and reports the
moments of its input. A block reports besides which of its neurons were active. Loops stack the
reports of sites that have weights of their own in each iteration, and sum all others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.learned import Learned
from hire_rewrite.ops.activity import Activity, expected_union, smallest_k
from hire_rewrite.ops.block import FFNSpec
from hire_rewrite.ops.moments import Moments
from hire_rewrite.passes.decide import Decision
from hire_rewrite.passes.observe import by_layer
from hire_rewrite.passes.pack import Calibration
from hire_rewrite.passes.raw import observed
from hire_rewrite.passes.rewrite import Rewritten, rewrite
from hire_rewrite.passes.rows import to_rows
from hire_rewrite.passes.shards import Shards
from hire_rewrite.passes.trace import Trace
from hire_rewrite.passes.view import evaluate
from hire_rewrite.passes.weights import site_loops
from hire_rewrite.patterns.ffn import FFNMatch
from hire_rewrite.patterns.graph import Node, Scope, Value
from hire_rewrite.patterns.linear import Linear
from hire_rewrite.rules import FFN

__all__ = ["conclude", "tapped"]

_TOKENS = (1, 2, 4, 8, 16, 32, 64)
"""For so many tokens in a call the rows that they share are estimated."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Tap:
    """The replacement of a linear layer by itself, with a report."""

    name: str
    linear: Linear
    shards: Shards | None
    loops: tuple[Scope, ...]
    state: None = None
    reports: bool = True

    @property
    def nodes(self) -> frozenset[Node]:
        return frozenset({self.linear.node})

    @property
    def inputs(self) -> tuple[Value, ...]:
        return self.linear.node.ins

    @property
    def outputs(self) -> tuple[Value, ...]:
        return self.linear.node.outs

    def emit(self, ins: Sequence[Any], *_: Any) -> tuple[list[Any], Any]:
        x = ins[self.linear.node.ins.index(self.linear.x)]
        moments = Moments.of(to_rows(x, self.linear.x_axes))
        return evaluate(self.linear.node, ins), (moments, None)


def tapped(trace: Trace, decisions: Sequence[Decision]) -> Rewritten:
    """The traced function with taps; its reports are `Moments` and, of blocks, their `Activity`.

    Both have leading axes for the scans, and for the shards, over which the site's weights vary.
    """
    return rewrite(trace, [_tap(trace, decision) for decision in decisions])


def conclude(
    trace: Trace, decisions: Sequence[Decision], reports: Mapping[str, Any] | None
) -> Calibration:
    """What the sum of all reports says about the sites that are packed, or yet undecided.

    Raises:
      HireRewriteError: no batch reached a site, or its inputs hold a NaN or an infinity.
    """
    moments: dict[str, Moments] = {}
    kept: dict[str, Any] = {}
    learned: dict[str, Learned] = {}
    for decision in decisions:
        name, loops = decision.found.name, site_loops(trace, decision.found.match)
        if reports is None:
            raise _unreached(name)
        if name not in reports:
            if not _needs(decision):
                continue
            raise _unreached(name)
        seen, active = by_layer(reports[name], loops, decision.found.shards)
        if not bool(seen.count.all()):
            if not _needs(decision):
                continue
            raise _unreached(name)
        if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(seen)):
            raise HireRewriteError(
                f"{name}: its input holds a NaN or an infinity in the calibration batches: look "
                "at the weights and the batches"
            )
        before = moments.get(decision.state)
        moments[decision.state] = seen if before is None else before + seen
        if active is not None:
            learned[name] = _learned(decision, active)
            now = kept.get(decision.state)
            kept[decision.state] = active.kept if now is None else now + active.kept
    return Calibration(moments, kept, learned)


def _learned(decision: Decision, active: Activity) -> Learned:
    spec, rule = decision.spec, decision.site.rule
    assert isinstance(spec, FFNSpec)
    assert isinstance(rule, FFN)
    if decision.undecided:
        return Learned(k=smallest_k(active, rule.keep, spec.groups) * spec.group)
    union = tuple(round(expected_union(active, n) * spec.group) for n in _TOKENS)
    return Learned(k=spec.k_groups * spec.group if rule.k == "auto" else None, union=union)


def _tap(trace: Trace, decision: Decision) -> Any:
    match = decision.found.match
    if isinstance(match, FFNMatch):
        return observed(trace, decision, shares=decision.undecided)
    found = decision.found
    return _Tap(found.name, match.linear, found.shards, site_loops(trace, match))


def _needs(decision: Decision) -> bool:
    """Whether a site cannot be packed as its rule says without having been seen."""
    rule = decision.site.rule
    assert rule is not None
    auto = isinstance(rule, FFN) and (rule.k == "auto" or bool(rule.common))
    return auto or rule.predictor.wants_calibration


def _unreached(name: str) -> HireRewriteError:
    return HireRewriteError(
        f"{name}: no calibration batch reached it: give batches of calls that run it"
    )
