"""From the rule of a block, and what calibration told, to the sizes of its operation."""

from __future__ import annotations

import dataclasses
import math

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.ops.ffn.activity import Activity, expected_union, smallest_k
from hire_rewrite.ops.ffn.block import FFNSpec
from hire_rewrite.rules import candidate_count, count
from hire_rewrite.sites.ffn.activation import Activation
from hire_rewrite.sites.ffn.match import FFNMatch
from hire_rewrite.sites.ffn.rule import FFN
from hire_rewrite.sites.kind import MatchedSite, Unfit

GROUP = 8
"""Neurons that are fetched together where the others are zero, unless the rule says."""

TOKENS = (1, 2, 4, 8, 16, 32, 64)
"""For so many tokens in a call the rows that they share are estimated."""


@dataclasses.dataclass(frozen=True)
class FFNStatistics:
    """Static numbers: they are part of a `Packed`'s type, not of its arrays.

    Attributes:
      k: the neurons that `k="auto"` found, or None.
      union: neurons that 1, 2, 4, ... tokens gather together, on average, where each token has its
        candidates as often as the calibration had them.
    """

    k: int | None = None
    union: tuple[int, ...] = ()

    def gathered(self, tokens: int) -> int | None:
        """Neurons that so many tokens gather together; None if it was not measured."""
        place = math.log2(max(tokens, 1))
        if place > len(self.union) - 1:
            return None
        low = self.union[math.floor(place)]
        high = self.union[math.ceil(place)]
        return math.ceil(low + (high - low) * (place - math.floor(place)))


def ffn_statistics(active: Activity, spec: FFNSpec, rule: FFN, undecided: bool) -> FFNStatistics:
    """What the activity of a block, with a leading axis of layers, says about its sizes."""
    if undecided:
        return FFNStatistics(k=smallest_k(active, rule.keep, spec.groups) * spec.group)
    union = tuple(round(expected_union(active, n) * spec.group) for n in TOKENS)
    return FFNStatistics(k=spec.k_groups * spec.group if rule.k == "auto" else None, union=union)


def ffn_spec(site: MatchedSite, rule: FFN, statistics: FFNStatistics | None) -> FFNSpec:
    """The sizes that a rule asks for at a block.

    Args:
      statistics: with `k="auto"` its k.

    Raises:
      HireRewriteError: the rule asks for more than there is.
      Unfit: the rule cannot be applied to this block.
    """
    match: FFNMatch = site.match
    width, up, activation = match.region.size, match.linears[0], match.activation
    _check_fits(rule, match)
    if match.experts > 1 and site.sharding.num_shards > 1:
        raise Unfit(
            f"its experts are sharded over {site.sharding}, where a top k is not supported; give "
            'k="positive" or tail="predicted"'
        )
    if statistics is not None and statistics.k is not None:
        rule = _with_k(site.name, rule, statistics.k, width)
    assert not isinstance(rule.k, str)
    num_shards = _num_shards(site, rule, width)
    if num_shards > 1 and (rule.common or activation.keeps is not None):
        raise Unfit(
            f"{num_shards} parts are not supported with common neurons, or where the function "
            "itself selects"
        )
    k = count(rule.k, width, f"{site.name}: k")
    group = math.gcd(rule.group or GROUP, width // num_shards)
    if num_shards > 1:  # so that k is not rounded up by much
        group = math.gcd(group, -(-k // num_shards))
    candidates = candidate_count(site.name, rule, k, min(width, 2 * k), width)
    common = count(rule.common, width, f"{site.name}: common") if rule.common else 0
    if common > candidates:
        raise HireRewriteError(
            f"{site.name}: common={rule.common} are {common} neurons, more than the {candidates} "
            "candidates that they are among: give fewer, or more candidates"
        )
    return FFNSpec(
        width=width,
        group=group,
        projections=len(match.region.projections),
        k_groups=-(-k // (group * num_shards)) * num_shards,
        candidate_groups=-(-candidates // (group * num_shards)) * num_shards,
        up_dtype=up.out.dtype,
        down_dtype=match.down.out.dtype,
        precision=up.node.params["precision"],
        compute_dtype=up.weight.dtype,
        gate=activation.gate,
        sparse=activation.sparse,
        gate_bias=activation.gate_bias if activation.sparse else None,
        selects=activation.keeps is not None,
        keeps_all=_keeps_all(activation, k, group, width),
        criterion=rule.criterion or "hidden",
        common_groups=min(-(-common // group), -(-candidates // group)),
        num_shards=num_shards,
    )


def _keeps_all(activation: Activation, k: int, group: int, width: int) -> bool:
    """Whether a rule asks for no fewer neurons than a block's own selection."""
    return activation.keeps is not None and group == 1 and k >= selected_k(activation, width)


def selected_k(activation: Activation, width: int) -> int:
    """The k that a block's own selection asks for; a statistic selects about that many."""
    assert activation.keeps is not None
    return min(width, activation.keeps if activation.name == "topk" else 2 * activation.keeps)


def _with_k(name: str, rule: FFN, k: int, width: int) -> FFN:
    """A rule with the k that calibration found, and at least as many candidates."""
    if rule.candidates is None:
        return rule.replace(k=k)
    candidates = count(rule.candidates, width, f"{name}: candidates")
    return rule.replace(k=k, candidates=max(k, candidates))


def _check_fits(rule: FFN, match: FFNMatch) -> None:
    """Raise Unfit if a block could be rewritten by another rule, but not by this one."""
    if rule.criterion == "output" and match.experts > 1:
        raise Unfit('criterion="output" is not supported for experts; give "hidden"')
    if rule.common and (match.activation.keeps is not None or match.experts > 1):
        raise Unfit(
            "common neurons are not supported where the function itself selects, or for experts; "
            "give common=0"
        )


def _num_shards(site: MatchedSite, rule: FFN, width: int) -> int:
    """Into how many parts neurons are divided: those of the devices, unless the rule says."""
    devices, asked = site.sharding.num_shards, rule.parts
    parts = asked or devices
    if parts % devices:
        raise HireRewriteError(
            f"{site.name}: parts={parts}, but its rows are sharded over {devices} devices: give "
            "that number, or None"
        )
    if parts != devices and devices > 1:
        raise Unfit(f"parts={parts} on {devices} devices are not supported; give parts={devices}")
    if width % parts and asked:
        raise HireRewriteError(
            f"{site.name}: parts={parts} does not divide the width {width}: give a divisor"
        )
    if width % parts:
        raise Unfit(f"its {width} neurons cannot be divided among {parts} devices alike")
    return parts
