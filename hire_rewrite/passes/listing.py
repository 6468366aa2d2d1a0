"""Which decisions are rows of the plan, which bytes each counts, and which share packed arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

from hire_rewrite.cost.estimate import dense_bytes

if TYPE_CHECKING:
    from hire_rewrite.passes.decide import Decision


def shown_of(decisions: Sequence[Decision], *, rules: bool) -> list[Decision]:
    """The decisions that are sites of the plan.

    What other kinds leave is one where a user asks for it, where it is packed, and where packing
    looked at it and left it as it is.

    Args:
      rules: whether the user gave some.
    """
    taken = frozenset(node for d in decisions if d.packs for node in d.products)
    return [
        d
        for d in decisions
        if not d.site.kind.leftover
        or d.packs
        or (rules and d.row.rule is not None)
        or (d.known and not d.products & taken)
    ]


def counted_once(decisions: Sequence[Decision]) -> list[Decision]:
    """The decisions with the bytes of each product in one row: its own, if it has one."""
    alone = frozenset(n for d in decisions if d.site.kind.leftover for n in d.products)
    counted = []
    for decision in decisions:
        inside = decision.products & alone
        if inside and not decision.site.kind.leftover:
            size = dense_bytes(decision.site, without=inside)
            reason = f"{decision.row.reason}; its layers have rows of their own, with their bytes"
            row = dataclasses.replace(
                decision.row, reason=reason, bytes_before=size, bytes_after=size
            )
            decision = dataclasses.replace(decision, row=row)
        counted.append(decision)
    return counted


def sharing(decisions: Sequence[Decision]) -> list[Decision]:
    """The decisions with one name for packed sites that are alike."""
    first: dict[Hashable, str] = {}
    shared = []
    for decision in decisions:
        if decision.packs:
            key = (decision.site.weights, decision.op.layout, decision.op.rule)
            name = first.setdefault(key, decision.packed_name)
            decision = dataclasses.replace(decision, packed_name=name)
        shared.append(decision)
    return shared
