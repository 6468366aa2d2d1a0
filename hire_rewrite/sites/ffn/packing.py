"""The arrays that a block is packed to: its rows laid out for gathering, and a fitted predictor."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.ops.encodings import Encoding, Stored
from hire_rewrite.ops.ffn.block import FFNSpec, FFNState, SiblingState
from hire_rewrite.ops.predictors import Predictor
from hire_rewrite.ops.quality import lengths
from hire_rewrite.sharding.rows import RowSharding
from hire_rewrite.sites.ffn.match import FFNMatch
from hire_rewrite.sites.kind import MatchedSite
from hire_rewrite.sites.linear.shards import stored_shards
from hire_rewrite.sites.operation import SiteCalibration
from hire_rewrite.sites.weight_rows import WeightRows, fit_predictor, stored_rows


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
    moments, active = (None, None) if calibration is None else calibration
    # Experts are told apart by their weights alone.
    moments = jax.tree.map(lambda leaf: jnp.repeat(leaf, match.experts, axis=0), moments)
    projections = tuple(weights.projection(item) for item in match.region.projections)
    projections = tuple(site.sharding.put_rows(rows, 1) for rows in projections)
    order = _group_order(site, spec, None if active is None else active.kept)
    up, scored = _up_in_groups(spec, projections, order)
    scored = site.sharding.put_rows(scored, 1)
    fitted = fit_predictor(predictor, scored, moments, advance)
    down, joined = second_rows(site, weights)
    down, vectors, norms = _down_in_groups(spec, down, weights.vectors(match.region), order)
    fused = siblings(match, weights)
    return FFNState(up, down, vectors, fitted, fused=fused, joined=joined, norms=norms)


@functools.partial(jax.jit, static_argnums=0)
def _up_in_groups(
    spec: FFNSpec, projections: tuple[jax.Array, ...], order: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The rows [layers, f, d_in] of some matrices as [layers, G, P, group, d_in], and those that
    are scored, [layers, scored_rows, d_in]."""
    up = jnp.stack([_in_groups(spec, rows, order) for rows in projections], axis=1)
    layers, count, *_, d_in = up.shape
    scored = up[:, :, spec.common_groups :].reshape(layers, count, spec.num_shards, -1, d_in)
    scored = jnp.swapaxes(scored, 1, 2).reshape(layers, spec.scored_rows, d_in)
    return jnp.swapaxes(up, 1, 2), scored


@functools.partial(jax.jit, static_argnums=0)
def _down_in_groups(
    spec: FFNSpec, down: jax.Array, vectors: tuple[jax.Array, ...], order: jax.Array | None
) -> tuple[jax.Array, tuple[jax.Array, ...], jax.Array | None]:
    """The rows of the last matrix in groups, numbers of each neuron too, and the rows' norms if
    they are asked for."""
    down = _in_groups(spec, down, order)
    norms = None
    if spec.criterion == "output":
        norms = lengths(down)
    return down, tuple(_in_groups(spec, vector, order) for vector in vectors), norms


def _in_groups(spec: FFNSpec, rows: jax.Array, order: jax.Array | None) -> jax.Array:
    """[layers, f, ...] as [layers, G, group, ...], the common groups first."""
    split = rows.reshape(rows.shape[0], spec.groups, spec.group, *rows.shape[2:])
    if order is None:
        return split
    places = order.reshape(order.shape + (1,) * (split.ndim - 2))
    return jnp.take_along_axis(split, places, axis=1)


Encodings = Mapping[str, Encoding]


class BlockRows(NamedTuple):
    """A block's weights as rows.

    Attributes:
      up: [L, P, f, d_in], of the first matrices.
      down: [L, f, d_out], of the second.
      vectors: of [L, f], numbers of each neuron.
    """

    up: jax.Array
    down: jax.Array
    vectors: tuple[jax.Array, ...]


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


def device_rows(site: MatchedSite, weights: WeightRows) -> BlockRows:
    """A block's rows as each device's own, all of a device's layers and experts in a row."""
    match: FFNMatch = site.match
    sharding = site.sharding

    def every(weights: WeightRows) -> BlockRows:
        ups = [weights.expert_projections(item) for item in match.region.projections]
        down = jnp.swapaxes(weights.experts(match.down), 2, 3)
        start = match.piece.start
        down = lax.slice_in_dim(down, start, start + match.region.size, axis=2)
        vectors = [vector[:, None] for vector in weights.vectors(match.region)]
        return BlockRows(jnp.stack(ups, axis=2), down, tuple(vectors))

    rows = weights.on_devices(every, sharding)
    return BlockRows(
        sharding.device_blocks(rows.up, 3),
        sharding.device_blocks(rows.down, 2),
        tuple(sharding.device_blocks(vector, 2) for vector in rows.vectors),
    )


def siblings(match: FFNMatch, weights: WeightRows) -> tuple[SiblingState, ...]:
    """The rows and vectors of the other parts of a fused product."""
    return tuple(
        SiblingState(tuple(map(weights.projection, part.projections)), weights.vectors(part))
        for part in match.region.siblings
    )


def packed_block(
    site: MatchedSite, weights: WeightRows, encodings: Encodings, make: Callable[..., Any]
) -> Any:
    """The packed arrays of a block, each device's own in a row where it is sharded.

    In a manual region, which runs on each device, rows are as they are, for `encoded_block`.

    Args:
      encodings: how the rows among the arrays are stored, by the name of the field.
      make: (BlockRows of one device, store) to a named tuple with these fields, `fused` and
        `joined`; `store` makes of an encoding and rows what is stored.
    """
    match: FFNMatch = site.match
    sharding = site.sharding
    if isinstance(sharding, RowSharding):
        own = PartitionSpec(sharding.axes)
        each = jax.jit(sharding.map(lambda rows: make(rows, _as_they_are), own, own))
        return encoded_block(site, encodings, each(device_rows(site, weights)))
    up = jnp.stack([weights.projection(item) for item in match.region.projections], axis=1)
    down, joined = second_rows(site, weights)
    store = stored_rows if sharding.region is None else _as_they_are
    state = make(BlockRows(up, down, weights.vectors(match.region)), store)
    return state._replace(fused=siblings(match, weights), joined=joined)


def encoded_block(site: MatchedSite, encodings: Encodings, arrays: Any) -> Any:
    """The packed arrays with what is stored of each device's rows in the place of these."""
    rows = {name: getattr(arrays, name) for name in encodings}
    return arrays._replace(
        **{
            name: stored_shards(stored["rows"], encodings[name], site.sharding)
            for name, stored in rows.items()
            if stored
        }
    )


def _as_they_are(encoding: Encoding, rows: jax.Array) -> Stored:
    return {"rows": rows}


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
