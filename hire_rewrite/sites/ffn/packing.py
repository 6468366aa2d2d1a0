"""The arrays that a block is packed to: its rows laid out for gathering, and a fitted predictor."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.ops.ffn.block import FFNSpec, FFNState, SiblingState
from hire_rewrite.ops.predictors import Predictor
from hire_rewrite.sites.ffn.match import FFNMatch
from hire_rewrite.sites.kind import MatchedSite
from hire_rewrite.sites.operation import SiteCalibration
from hire_rewrite.sites.weight_rows import WeightRows, fit_predictor


def packed_ffn(
    site: MatchedSite,
    predictor: Predictor,
    spec: FFNSpec,
    weights: WeightRows,
    calibration: SiteCalibration | None,
    advance: Callable[[], None],
) -> FFNState:
    """The packed arrays of a block; see `Operation.pack`."""
    match: FFNMatch = site.match
    group, groups = spec.group, spec.groups
    moments, active = (None, None) if calibration is None else calibration
    # Experts are told apart by their weights alone.
    moments = jax.tree.map(lambda leaf: jnp.repeat(leaf, match.experts, axis=0), moments)
    up = jnp.stack([weights.projection(item) for item in match.region.projections], axis=1)
    up = site.sharding.put_rows(up, 2)
    layers, projections, _, d_in = up.shape
    order = _group_order(site, spec, None if active is None else active.kept)

    def grouped(rows: jax.Array) -> jax.Array:
        """[layers, f, ...] as [layers, G, group, ...], the common groups first."""
        split = rows.reshape(layers, groups, group, *rows.shape[2:])
        if order is None:
            return split
        places = order.reshape(order.shape + (1,) * (split.ndim - 2))
        return jnp.take_along_axis(split, places, axis=1)

    up = jax.vmap(grouped, 1, 1)(up)
    scored = up[:, :, spec.common_groups :]
    scored = scored.reshape(layers, projections, spec.num_shards, -1, d_in)
    scored = jnp.swapaxes(scored, 1, 2).reshape(layers, spec.scored_rows, d_in)
    scored = site.sharding.put_rows(scored, 1)
    fitted = fit_predictor(predictor, scored, moments, advance)
    down, joined = second_rows(site, weights)
    down = grouped(down)
    norms = None
    if spec.criterion == "output":
        norms = jnp.linalg.norm(down.astype(jnp.float32), axis=-1)
    return FFNState(
        up=jnp.swapaxes(up, 1, 2),
        down=down,
        vectors=tuple(map(grouped, weights.vectors(match.region))),
        predictor=fitted,
        fused=siblings(match, weights),
        joined=joined,
        norms=norms,
    )


def second_rows(site: MatchedSite, weights: WeightRows) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The rows of the last matrix that the neurons are for, [layers, f, d_out], and those that each
    other input of it is for."""
    match: FFNMatch = site.match
    axis, start = match.piece.axis, match.piece.start
    rows = jnp.swapaxes(weights.linear(match.down), 1, 2)
    rows = site.sharding.put_rows(rows, 1)
    joined = tuple(
        lax.slice_in_dim(rows, first, first + value.shape[axis], axis=1)
        for value, first in match.piece.others
    )
    return lax.slice_in_dim(rows, start, start + match.region.size, axis=1), joined


def siblings(match: FFNMatch, weights: WeightRows) -> tuple[SiblingState, ...]:
    """The rows and vectors of the other parts of a fused product."""
    return tuple(
        SiblingState(tuple(map(weights.projection, part.projections)), weights.vectors(part))
        for part in match.region.siblings
    )


def _group_order(site: MatchedSite, spec: FFNSpec, kept: jax.Array | None) -> jax.Array | None:
    """i32[layers, G]: the groups with the most common ones first; None if they stay as they are.

    Among the common ones and among the others they keep the order of the model.

    Args:
      kept: f32[layers, G], how often each group was among the k greatest.
    """
    if not spec.common_groups:
        return None
    if kept is None:
        raise HireRewriteError(
            f"{site.name}: common neurons are those that calibration found most active: give "
            "pack(..., calibration=batches), or common=0"
        )
    kept = jnp.repeat(kept, site.experts, axis=0)
    best = jnp.argsort(-kept, axis=1, stable=True)
    common = jnp.sort(best[:, : spec.common_groups], axis=1)
    return jnp.concatenate([common, jnp.sort(best[:, spec.common_groups :], axis=1)], axis=1)
