"""What calibration asks of a function's sites, and what is concluded from it.

A tap stands in the place of a head's product: it computes the product as it was, and reports the
moments of its input. A block reports besides which of its neurons were active. Loops stack the
reports of sites that have weights of their own in each iteration, and sum all others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.graph.view import run_node
from hire_rewrite.learned import Learned
from hire_rewrite.ops.ffn.activity import Activity, expected_union, smallest_k
from hire_rewrite.ops.ffn.block import FFNSpec
from hire_rewrite.ops.moments import Moments
from hire_rewrite.passes.decide import Decision
from hire_rewrite.passes.observe import by_layer
from hire_rewrite.passes.pack import Calibration
from hire_rewrite.passes.raw import observed
from hire_rewrite.passes.rewrite import Rewritten, rewrite
from hire_rewrite.passes.trace import Trace
from hire_rewrite.rules import FFN
from hire_rewrite.sharding.placement import automatic
from hire_rewrite.sites.ffn.match import FFNMatch
from hire_rewrite.sites.layout import to_rows
from hire_rewrite.sites.replacement import SiteReplacement
from hire_rewrite.sites.weights import site_loops

__all__ = ["conclude", "tapped"]

_TOKENS = (1, 2, 4, 8, 16, 32, 64)
"""For so many tokens in a call the rows that they share are estimated."""


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
    moments, kept = jax.tree.map(automatic, (moments, kept))
    return Calibration(moments, kept, learned)


def _learned(decision: Decision, active: Activity) -> Learned:
    spec, rule = decision.spec, decision.site.rule
    assert isinstance(spec, FFNSpec)
    assert isinstance(rule, FFN)
    if decision.undecided:
        return Learned(k=smallest_k(active, rule.keep, spec.groups) * spec.group)
    union = tuple(round(expected_union(active, n) * spec.group) for n in _TOKENS)
    return Learned(k=spec.k_groups * spec.group if rule.k == "auto" else None, union=union)


def _tap(trace: Trace, decision: Decision) -> SiteReplacement:
    """A site as it is, which reports what it sees."""
    match = decision.found.match
    if isinstance(match, FFNMatch):
        return observed(trace, decision, shares=decision.undecided)
    found, node = decision.found, match.linear.node
    inputs = tuple(dict.fromkeys(v for v in node.ins if v.literal is None and v.const is None))

    def run(ins: Sequence[Any], *_: Any) -> tuple[list[Any], Any]:
        env = dict(zip(inputs, ins, strict=True))
        run_node(node, env)
        moments = Moments.of(to_rows(env[match.linear.x], match.linear.x_axes))
        return [env[match.linear.out]], (moments, None)

    return SiteReplacement(
        found.name,
        frozenset({node}),
        inputs,
        node.outs,
        run,
        shards=found.shards,
        loops=site_loops(trace, match),
        reports=True,
    )


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
