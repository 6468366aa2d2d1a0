"""Lay out the weights of the sites for gathering, and fit their predictors.

Everything that depends on weights alone is computed here, once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from hire_rewrite import _compat
from hire_rewrite.errors import HireRewriteError, is_out_of_memory
from hire_rewrite.graph.trace import Trace, abstract
from hire_rewrite.graph.weights import Stacker
from hire_rewrite.origin import Origin
from hire_rewrite.packed import Packed
from hire_rewrite.packed_info import ExaminedSite, PackedInfo, PackedSite
from hire_rewrite.passes.decision import Decision
from hire_rewrite.passes.examine import weight_stacker
from hire_rewrite.passes.modes import HIRE
from hire_rewrite.passes.progress import progress
from hire_rewrite.passes.rewrite import rewrite
from hire_rewrite.sharding.rows import RowSharding, automatic, on_mesh
from hire_rewrite.sites.operation import SiteCalibration
from hire_rewrite.sites.weight_rows import WeightRows, all_finite


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What calibration told.

    Attributes:
      sites: what it saw of each packed site, by the name under which the site is packed.
      statistics: what is static, by the label of the site (see `Operation.examine` too).
    """

    sites: Mapping[str, SiteCalibration] = dataclasses.field(default_factory=dict)
    statistics: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def pack(
    trace: Trace,
    decisions: Sequence[Decision],
    origin: Origin,
    weights: Sequence[Any],
    calibration: Calibration,
    known: Sequence[Packed] = (),
) -> Packed:
    """Pack the weights of a traced function.

    Args:
      weights: its weight inputs, in order.
      calibration: sites that it has not seen have predictors fitted to the weights alone.
      known: made of the same weights, and of no calibration: their arrays of sites are taken.

    Raises:
      HireRewriteError: a site's weights hold a NaN or an infinity, its calibration has too few
        tokens for its predictor, its rule needs calibration and there is none, or memory does not
        suffice.
    """
    arrays = dict(zip(trace.weights, weights, strict=True))
    stacker = weight_stacker(trace, weights)
    packing = [decision for decision in decisions if decision.packs]
    firsts = [decision for decision in packing if decision.packed_name == decision.name]
    described = {
        d.name: PackedSite(
            d.site.kind.name,
            d.name,
            d.site.key,
            repr(d.op.layout),
            calibration.statistics.get(d.site.label),
        )
        for d in firsts
    }
    there = {
        dataclasses.replace(site, name=""): other.sites[site.name]
        for other in known
        for site in other.info.sites
    }
    alike = {name: dataclasses.replace(site, name="") for name, site in described.items()}
    sites: dict[str, Any] = {n: there[site] for n, site in alike.items() if site in there}
    new = [decision for decision in firsts if decision.name not in sites]
    with progress("packing", "layer", sum(d.site.layers for d in new)) as advance:
        for decision in new:
            try:
                sites[decision.name] = _packed_site(decision, stacker, calibration, advance)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                sites.clear()  # a traceback that somebody keeps would keep them too
                raise HireRewriteError(
                    f"{decision.name}: memory does not suffice to pack it ({error}): nothing is "
                    "kept of what was packed before it. Free memory, or give rules with fewer bits "
                    "or for fewer layers (path=)"
                ) from error.with_traceback(None)
    swaps = [swap for d in packing for swap in HIRE.packed(d, sites[d.packed_name])]
    needs = rewrite(trace, swaps).needs
    kept = {  # a `jax.Ref` as it is
        trace.paths[i]: array if _compat.is_ref(jax.typeof(array)) else jnp.asarray(array)
        for i, array in arrays.items()
        if i in needs
    }
    meshes = [d.site.sharding for d in packing if isinstance(d.site.sharding, RowSharding)]
    if meshes:  # all on the same devices
        kept, sites = jax.tree.map(lambda array: on_mesh(array, meshes[0]), (kept, sites))
    names = [decision.name for decision in decisions]
    info = PackedInfo(
        origin,
        tuple(described.values()),
        tuple(
            ExaminedSite(d.site.kind.name, d.name, d.site.key, calibration.statistics[d.site.label])
            for d in decisions
            if d.site.label in calibration.statistics and not d.packs
        ),
        tuple(d.op.tuned_rule().for_layer(d.name, names, force=True) for d in packing),
        tuple(map(abstract, jax.tree.leaves((kept, sites)))),
    )
    return Packed(kept, sites, info)


def pack_shapes(
    trace: Trace,
    decisions: Sequence[Decision],
    origin: Origin,
    weights: Sequence[jax.ShapeDtypeStruct],
    calibration: Calibration,
) -> Packed:
    """`pack` of shapes: a `Packed` of shapes, with shardings where weights are sharded."""
    packed: Packed = jax.eval_shape(
        lambda arrays: pack(trace, decisions, origin, arrays, calibration),
        list(map(automatic, weights)),
    )
    placed: dict[str, Any] = {}
    for decision in decisions:
        if decision.packs and decision.name in packed.sites:
            arrays = packed.sites[decision.name]
            shardings = decision.site.sharding.shardings(arrays, decision.op.partition_specs)
            if shardings is not None:
                placed[decision.name] = jax.tree.map(_with_sharding, arrays, shardings)
    over = (array.sharding for array in (*jax.tree.leaves(placed), *origin.specs))
    mesh = next((each.mesh for each in over if isinstance(each, NamedSharding)), None)
    if mesh is None:
        return packed
    replicated = NamedSharding(mesh, PartitionSpec())
    sites = {
        name: placed.get(name) or jax.tree.map(lambda a: _with_sharding(a, replicated), arrays)
        for name, arrays in packed.sites.items()
    }
    specs = dict(zip(origin.paths, origin.specs, strict=True))
    kept: dict[str, Any] = {
        path: _with_sharding(array, specs[path].sharding or replicated)
        for path, array in packed.weights.items()
    }
    return dataclasses.replace(packed, weights=kept, sites=sites)


def _with_sharding(array: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def _packed_site(
    decision: Decision, stacker: Stacker, calibration: Calibration, advance: Callable[[], None]
) -> Any:
    """The packed arrays of a site, on the devices that are to hold them."""
    site, operation = decision.site, decision.op
    seen = calibration.sites.get(decision.name)
    if seen is not None:
        tokens = int(seen[0].count.min())
        operation.check(tokens)
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1
        advance()

    def pack_rows(stacker: Stacker, seen: SiteCalibration | None) -> Any:
        arrays = operation.pack(WeightRows(stacker, site.loops), seen, step)
        layers = site.layers, site.layers * site.sharding.row_shards  # or those of each device
        for leaf in jax.tree.leaves(arrays):
            if not leaf.shape or leaf.shape[0] not in layers:
                raise HireRewriteError(
                    f"{site.name}: `pack` of {site.kind.name} sites returned an array of shape "
                    f"{leaf.shape}, which has to begin with its {site.layers} layer(s)"
                )
        return arrays

    arrays = operation.encoded(site.sharding.pack(pack_rows, stacker, seen))
    for _ in range(site.layers - steps):  # devices pack all of their layers at once
        advance()
    arrays = site.sharding.put(arrays, operation.partition_specs)
    _check_finite(site.name, operation.rows(arrays))
    return arrays


def _check_finite(name: str, rows: Any) -> None:
    """Raise HireRewriteError if what is stored of a site's rows holds a NaN or an infinity."""
    floating = [a for a in jax.tree.leaves(rows) if jnp.issubdtype(a.dtype, jnp.floating)]
    if not floating or isinstance(floating[0], jax.core.Tracer):
        return
    if not bool(all_finite(floating)):
        raise HireRewriteError(
            f"{name}: its weights hold a NaN or an infinity, for which nothing can be "
            "predicted, or numbers too large to be stored or predicted as its rule says (a "
            "scale of float16 is at most 65504): look at the weights, exclude the site with a "
            'rule\'s path=, or give scale="bfloat16" to the encoding'
        )
