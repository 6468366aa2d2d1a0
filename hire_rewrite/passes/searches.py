"""What looks for the greatest logits of a head whose rows are spread over devices.

The compiler gathers all logits for a `top_k` along an axis that is spread. `da_top_k` compares a
few of each device instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import primitives as p
from jax.sharding import PartitionSpec

from hire_rewrite.ops.da_top_k import da_top_k
from hire_rewrite.ops.spread import Spread
from hire_rewrite.passes.site import SiteReplacement
from hire_rewrite.patterns.graph import Node
from hire_rewrite.patterns.head import HeadMatch

__all__ = ["spread_searches"]


def spread_searches(
    name: str, match: HeadMatch, spread: Spread, recall_target: float
) -> list[SiteReplacement]:
    """The replacements of a head's searches."""
    return [
        _search(f"{name} ({node.primitive})", node, spread, recall_target)
        for node in match.searches
        if node.primitive is p.top_k_p
        or (node.params["is_max_k"] and node.params["aggregate_to_topk"])
    ]


def _search(name: str, node: Node, spread: Spread, recall_target: float) -> SiteReplacement:
    (operand,) = node.ins
    values, indices = node.outs
    axis = node.params.get("reduction_dimension", node.params.get("axis", -1)) % len(operand.shape)
    k = values.shape[axis]

    def run(ins: Sequence[Any], *_: Any) -> list[Any]:
        logits = jnp.moveaxis(ins[0], axis, -1)
        rows = logits.reshape(-1, logits.shape[-1])
        spec = PartitionSpec(spread.tokens(rows.shape[0]), spread.axes)
        found = da_top_k(rows, k, mesh=spread.mesh, spec=spec, recall_target=recall_target)
        shape = (*logits.shape[:-1], k)
        best, places = (jnp.moveaxis(array.reshape(shape), -1, axis) for array in found)
        return [best, places.astype(indices.dtype)]

    return SiteReplacement(name, frozenset({node}), (operand,), node.outs, run)
