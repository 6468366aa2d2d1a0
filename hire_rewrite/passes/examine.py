"""Look at the numbers of weights, where what a site is packed to depends on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hire_rewrite.graph.trace import Trace
from hire_rewrite.graph.weights import Stacked, Stacker
from hire_rewrite.passes.decision import Decision
from hire_rewrite.sites.weight_rows import WeightRows


def examine(trace: Trace, decisions: Sequence[Decision], weights: Sequence[Any]) -> dict[str, Any]:
    """What `Operation.examine` found out, by the label of the site, where that is anything.

    Args:
      weights: the weight inputs of the traced function, in order.
    """
    stacker = weight_stacker(trace, weights)
    told = {d.site.label: d.op.examine(WeightRows(stacker, d.site.loops)) for d in decisions}
    return {label: statistics for label, statistics in told.items() if statistics is not None}


def weight_stacker(trace: Trace, weights: Sequence[Any]) -> Stacker:
    """Evaluates the weights of a traced function, whose weight inputs are `weights`, in order."""
    arrays = zip(trace.weights, weights, strict=True)
    return Stacker({trace.scope.inputs[i]: Stacked(array, ()) for i, array in arrays})
