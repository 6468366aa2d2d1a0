"""Which decisions are rows of the plan, which bytes each counts, and which share packed arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Hashable, Sequence

from hire_rewrite.cost.estimate import dense_bytes
from hire_rewrite.graph.nodes import Node
from hire_rewrite.passes.decision import Decision


def shown_of(
    decisions: Sequence[Decision], near: Collection[Node], *, rules: bool
) -> list[Decision]:
    """The decisions that are sites of the plan.

    What other kinds leave is one where it is packed and where a user's rule asks for it. Without
    rules it is one too, unless it came near another site; as a part of another site it is, if fewer
    bits hold the numbers of some part. A site that no rule of the user's asks for is none if all
    its products are sites of their own.

    Args:
      near: products whose plan says what stopped a match.
      rules: whether the user gave some.
    """
    fitting = frozenset(n for d in decisions if _fits(d) for n in d.products)
    whole = [d for d in decisions if not d.site.kind.leftover]
    hidden = {n for d in whole if not d.products & fitting for n in d.products} | {*near}
    alone = frozenset(
        n
        for d in decisions
        if d.site.kind.leftover
        and (d.packs or (d.row.rule is not None and (rules or not d.products & hidden)))
        for n in d.products
    )
    return [
        d
        for d in decisions
        if (d.products <= alone) == d.site.kind.leftover
        or (not d.site.kind.leftover and rules and d.row.rule is not None)
    ]


def _fits(decision: Decision) -> bool:
    """Whether it is known that a layer that other kinds leave can be stored in fewer bits."""
    return decision.site.kind.leftover and decision.cost is not None


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
