"""The top k of the logits of a head whose rows are sharded over devices.

For a `top_k` along an axis that is sharded the compiler gathers all logits; inside a `shard_map`
the function itself does. `da_top_k` compares a few of each device instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import primitives as p
from jax.sharding import PartitionSpec

from hire_rewrite.graph.nodes import Node, Value
from hire_rewrite.ops.top_k.da_top_k import da_top_k
from hire_rewrite.sharding.rows import RowSharding, Sharding
from hire_rewrite.sites.head.match import HeadMatch
from hire_rewrite.sites.replacement import SiteReplacement


def logit_top_k(
    name: str, match: HeadMatch, sharding: Sharding, recall_target: float
) -> list[SiteReplacement]:
    """The replacements of what looks for the greatest logits of a head."""
    replacements = []
    for search in match.top_ks:
        node, gather = search.node, search.gather
        if node.primitive is p.approx_top_k_p and not (
            node.params["is_max_k"] and node.params["aggregate_to_topk"]
        ):
            continue
        label = f"{name} ({node.primitive})"
        if gather is not None and sharding.region is not None:
            find = _within(gather.params["axis_name"], recall_target)
            replacements.append(_search(label, node, gather.ins[0], find, sharding.region))
        elif gather is None and isinstance(sharding, RowSharding):
            find = _between(sharding, recall_target)
            replacements.append(_search(label, node, node.ins[0], find, None))
    return replacements


def _between(sharding: RowSharding, recall_target: float) -> Callable[[Any, int], Any]:
    """For rows that are sharded over a mesh."""

    def find(rows: Any, k: int) -> Any:
        spec = PartitionSpec(sharding.token_axes(rows.shape[0]), sharding.axes)
        return da_top_k(rows, k, mesh=sharding.mesh, spec=spec, recall_target=recall_target)

    return find


def _within(axes: Any, recall_target: float) -> Callable[[Any, int], Any]:
    """For the shard of rows that a device has."""
    return lambda rows, k: da_top_k(rows, k, axis_name=axes, recall_target=recall_target)


def _search(
    name: str,
    node: Node,
    operand: Value,
    find: Callable[[Any, int], Any],
    region: Any,
) -> SiteReplacement:
    """Finds in `operand` what a node finds in what is made of it."""
    best = node.primitive is p.argmax_p
    along = node.params["axes"][0] if best else None
    if along is None:
        along = node.params.get("reduction_dimension", node.params.get("axis", -1))
    axis = along % len(operand.shape)
    k, dtype = 1 if best else node.outs[0].shape[axis], node.outs[-1].dtype

    def run(ins: Sequence[Any], *_: Any) -> list[Any]:
        logits = jnp.moveaxis(ins[0], axis, -1)
        found = find(logits.reshape(-1, logits.shape[-1]), k)
        shape = (*logits.shape[:-1], k)
        values, places = (jnp.moveaxis(array.reshape(shape), -1, axis) for array in found)
        places = places.astype(dtype)
        return [places.squeeze(axis)] if best else [values, places]

    return SiteReplacement(name, frozenset({node}), (operand,), node.outs, run, shards=region)
