"""The linear layers of a plan in the order of the program, with what each of them reads."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from hire_rewrite.graph.feeds import feeds
from hire_rewrite.graph.nodes import Node
from hire_rewrite.graph.weights import narrow
from hire_rewrite.passes.decision import Decision
from hire_rewrite.passes.detect import Detection, weight_of
from hire_rewrite.plan import Layer, Rejection, layer_of


def layers_of(
    detection: Detection, shown: Sequence[Decision], rejected: Sequence[tuple[Node, Rejection]]
) -> tuple[Layer, ...]:
    """Sites and near misses as layers; each product belongs to one of them.

    Args:
      shown: the decisions that are sites of the plan, with the bytes that each counts. One all of
        whose products have rows of their own is not a layer.
      rejected: the plan's other linear layers.
    """
    owners: dict[Node, int] = {}
    for number, decision in enumerate(shown):
        for node in decision.products:
            if decision.site.kind.leftover:
                owners[node] = number
            else:
                owners.setdefault(node, number)
    items = [layer_of(decision.row) for decision in shown]
    for node, rejection in rejected:
        owners[node] = len(items)
        items.append(_near_miss(detection, node, rejection))
    reads = feeds(detection.trace.scope, owners.keys())
    ends = {owners[node]: i for i, node in enumerate(reads)}  # the last of its products
    places = {owner: place for place, owner in enumerate(sorted(ends, key=lambda o: ends[o]))}
    found: dict[int, set[int]] = {place: set() for place in places.values()}
    for node, before in reads.items():
        place = places[owners[node]]
        found[place] |= {p for p in (places[owners[n]] for n in before) if p < place}
    return tuple(
        dataclasses.replace(items[owner], reads=tuple(sorted(found[place])))
        for owner, place in places.items()
    )


def _near_miss(detection: Detection, node: Node, rejection: Rejection) -> Layer:
    weight, _ = weight_of(detection.trace, node)
    runs = math.prod(scope.length or 1 for scope in node.scope.ancestors())
    size = runs * math.prod(weight.shape) * narrow(weight).dtype.itemsize
    about = " × ".join(map(str, rejection.shape))
    return Layer(rejection.name, "", "in no site", about, runs, size, size)
