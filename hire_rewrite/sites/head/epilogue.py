"""The function's own code behind the logits of a head, and what looks for the greatest of them.

For a `top_k` along an axis that is sharded the compiler gathers all logits; inside a `shard_map`
the function itself does. `da_top_k` compares a few of each device instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import primitives as p
from jax.sharding import PartitionSpec

from hire_rewrite.graph.evaluate import run_node
from hire_rewrite.graph.nodes import Node, Value
from hire_rewrite.ops.head.spec import Endpoints
from hire_rewrite.ops.top_k.da_top_k import da_top_k
from hire_rewrite.patterns.region import from_tokens, to_tokens
from hire_rewrite.sharding.rows import RowSharding, Sharding
from hire_rewrite.sites.head.match import HeadMatch
from hire_rewrite.sites.replacement import SiteReplacement


def epilogue_of(match: HeadMatch, side_inputs: Mapping[Value, Any]) -> Endpoints:
    """The function's own code behind the logits: [tokens, V] to [tokens, V] for each output."""

    def run(raw: Any) -> tuple[Any, ...]:
        logits = match.logits
        env = {**side_inputs, logits: from_tokens(raw, logits.shape, (match.axis,))}
        for node in match.epilogue:
            run_node(node, env)
        return tuple(to_tokens(env[v], match.places[v][:1]) for v in match.outputs)

    return run


def output_values(match: HeadMatch, results: Sequence[Any]) -> list[Any]:
    """The outputs [tokens, V] as the function lays them out."""
    return [
        from_tokens(rows, value.shape, match.places[value][:1])
        for value, rows in zip(match.outputs, results, strict=True)
    ]


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
        if gather is not None and sharding.region is not None:
            axes = gather.params["axis_name"]
            find = functools.partial(da_top_k, axis_name=axes, recall_target=recall_target)
        elif gather is None and isinstance(sharding, RowSharding):
            find = functools.partial(_over_mesh, sharding=sharding, recall_target=recall_target)
        else:
            continue
        operand = (gather or node).ins[0]
        label = f"{name} ({node.primitive})"
        replacements.append(_search(label, node, operand, find, sharding.region))
    return replacements


def _over_mesh(rows: Any, k: int, *, sharding: RowSharding, recall_target: float) -> Any:
    spec = PartitionSpec(sharding.token_axes(rows.shape[0]), sharding.axes)
    return da_top_k(rows, k, mesh=sharding.mesh, spec=spec, recall_target=recall_target)


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

    def run(ins: Sequence[Any], *_: Any) -> Any:
        logits = jnp.moveaxis(ins[0], axis, -1)
        greatest = find(logits.reshape(-1, logits.shape[-1]), k)
        shape = (*logits.shape[:-1], k)
        values, places = (jnp.moveaxis(array.reshape(shape), -1, axis) for array in greatest)
        places = places.astype(dtype)
        return ([places.squeeze(axis)] if best else [values, places]), None

    return SiteReplacement(name, frozenset({node}), (operand,), node.outs, run, shards=region)
