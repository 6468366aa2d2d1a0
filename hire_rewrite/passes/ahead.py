"""Packing ahead of time: shapes and shardings in place of arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from hire_rewrite.ops.ffn.sharded import state_specs
from hire_rewrite.packed import Origin, Packed
from hire_rewrite.passes.decide import Decision
from hire_rewrite.passes.pack import Calibration, pack
from hire_rewrite.passes.trace import Trace
from hire_rewrite.sharding.placement import automatic

__all__ = ["pack_shapes"]


def pack_shapes(
    trace: Trace,
    decisions: Sequence[Decision],
    origin: Origin,
    weights: Sequence[jax.ShapeDtypeStruct],
) -> Packed:
    """`pack` of shapes: a `Packed` of shapes, with shardings where weights are spread."""
    packed = jax.eval_shape(
        lambda arrays: pack(trace, decisions, origin, arrays, Calibration()),
        list(map(automatic, weights)),
    )
    placed = [d for d in decisions if d.packs and (d.found.spread or d.found.shards)]
    if not placed:
        return packed

    def laid(shape: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    sites: dict[str, Any] = dict(packed.sites)
    whole: NamedSharding | None = None
    for decision in placed:
        state = packed.sites[decision.state]
        mesh, specs = _placement(decision, state)
        whole = whole or NamedSharding(mesh, PartitionSpec())
        sites[decision.state] = jax.tree.map(
            lambda shape, one, mesh=mesh: laid(shape, NamedSharding(mesh, one)), state, specs
        )
    for name, state in sites.items():
        if all(decision.state != name for decision in placed):
            sites[name] = jax.tree.map(lambda shape: laid(shape, whole), state)
    known = dict(zip(origin.paths, origin.specs, strict=True))
    kept = {
        path: laid(shape, known[path].sharding or whole) for path, shape in packed.weights.items()
    }
    return dataclasses.replace(packed, weights=kept, sites=sites)


def _placement(decision: Decision, state: Any) -> tuple[Any, Any]:
    """The mesh of a site, and the `PartitionSpec`s of its arrays."""
    spread, shards = decision.found.spread, decision.found.shards
    if shards is not None:
        return shards.mesh, jax.tree.map(lambda _: shards.spec, state)
    assert spread is not None
    assert decision.spec is not None
    assert decision.site.rule is not None
    predictor = decision.site.rule.predictor
    return spread.mesh, state_specs(state, decision.spec, predictor, spread)
