"""Have replacements that read the same inputs run in one call, where their kinds say how."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any

from hire_rewrite import _compat
from hire_rewrite.sites.replacement import SiteReplacement


def joined(replacements: Sequence[SiteReplacement]) -> list[SiteReplacement]:
    """The replacements, those of equal joints and inputs together.

    Each stands where its inputs are all that it waits for, so nothing can come between them. They
    have to stand in one call of the traced function, which would dissolve otherwise.
    """
    groups: dict[Hashable, list[SiteReplacement]] = defaultdict(list)
    for replacement in replacements:
        groups[_key(replacement)].append(replacement)
    return [group[0] if len(group) == 1 else _together(group) for group in groups.values()]


def _key(replacement: SiteReplacement) -> Hashable:
    joint, nodes, region = replacement.joint, replacement.nodes, replacement.shards
    places = {(node.frame, _compat.annotations(node.eqn)) for node in nodes}
    if joint is None or len(places) > 1:
        return replacement  # it equals no other
    shards = None if region is None else (region.scope, region.axes)
    return joint.key, replacement.inputs, replacement.loops, shards, *places


def _together(group: Sequence[SiteReplacement]) -> SiteReplacement:
    first, joints = group[0], [r.joint for r in group if r.joint is not None]

    def run(ins: Sequence[Any], layer: Any, states: Sequence[Any]) -> tuple[list[Any], None]:
        results = joints[0].start(ins, layer, states)
        pairs = zip(joints, results, strict=True)
        return [out for joint, result in pairs for out in joint.finish(result)], None

    return SiteReplacement(
        ", ".join(replacement.name for replacement in group),
        frozenset().union(*(replacement.nodes for replacement in group)),
        first.inputs,
        tuple(itertools.chain.from_iterable(replacement.outputs for replacement in group)),
        run,
        [replacement.state for replacement in group],
        shards=first.shards,
        loops=first.loops,
        reports=any(replacement.reports for replacement in group),
        known={name: each for r in group for name, each in r.known.items()},
    )
