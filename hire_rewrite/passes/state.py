"""The arrays that a site is packed to: its rows laid out for gathering, and a fitted predictor.

All of them have a leading axis of layers: the iterations of the scans in which the site's weights
differ, times its experts.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.graph.nodes import Scope
from hire_rewrite.ops.ffn.block import FFNSpec, FFNState, PartState
from hire_rewrite.ops.ffn.sharded import state_specs
from hire_rewrite.ops.head.head import HeadSpec, HeadState
from hire_rewrite.ops.moments import Moments
from hire_rewrite.ops.predictors import Certifying, Predictor
from hire_rewrite.passes.decide import Decision
from hire_rewrite.patterns.linear import Linear
from hire_rewrite.patterns.region import Projection, Region
from hire_rewrite.sharding.placement import put, put_rows
from hire_rewrite.sites.head.match import HeadMatch
from hire_rewrite.sites.layout import cut_out
from hire_rewrite.sites.weights import Stacker, narrow

__all__ = ["site_state"]


def site_state(
    decision: Decision,
    stacker: Stacker,
    loops: tuple[Scope, ...],
    moments: Moments | None,
    kept: jax.Array | None,
    advance: Callable[[], None],
) -> FFNState | HeadState:
    """The packed arrays of a site.

    Args:
      loops: the scans in whose iterations its weights differ.
      moments, kept: what calibration saw of it, if it did (see `passes.pack.Calibration`).
      advance: called when a layer is done.
    """
    match, rule = decision.found.match, decision.site.rule
    assert rule is not None
    spec = decision.spec
    if isinstance(match, HeadMatch):
        assert isinstance(spec, HeadSpec)
        rows = _rows(match.linear, stacker, loops)
        rows = jnp.pad(rows, ((0, 0), (0, spec.rows - spec.width), (0, 0)))
        rows = _laid_out(rows, decision, 1)
        fitted = _fit(rule.predictor, rows, moments, advance, spec.candidates)
        head = HeadState(rows, fitted, _bound(rule.predictor, spec, rows, fitted))
        return _spread_out(head, decision)
    assert isinstance(spec, FFNSpec)
    width, group = spec.width, spec.group
    groups = width // group
    if moments is not None:  # experts are told apart by their weights alone
        moments = jax.tree.map(lambda leaf: jnp.repeat(leaf, match.experts, axis=0), moments)
    up = jnp.stack([_projected(item, stacker, loops) for item in match.region.projections], axis=1)
    up = _laid_out(up, decision, 2)
    count, projections, _, d_in = up.shape
    order = _order(decision, kept)

    def grouped(rows: jax.Array) -> jax.Array:
        """[layers, f, ...] as [layers, G, group, ...], the common groups first."""
        split = rows.reshape(count, groups, group, *rows.shape[2:])
        if order is None:
            return split
        places = order.reshape(order.shape + (1,) * (split.ndim - 2))
        return jnp.take_along_axis(split, places, axis=1)

    up = jnp.stack([grouped(up[:, i]) for i in range(projections)], axis=1)
    scored = up[:, list(spec.scored), spec.common_groups :]
    scored = scored.reshape(count, len(spec.scored), spec.parts, -1, d_in)
    scored = jnp.swapaxes(scored, 1, 2).reshape(count, spec.scored_rows, d_in)
    scored = _laid_out(scored, decision, 1)
    predictor = _fit(rule.predictor, scored, moments, advance)
    vectors = _vectors(match.region, stacker, loops)
    expert = _expert(match.down.expert_axes())
    down = jnp.swapaxes(_rows(match.down, stacker, loops, expert), 1, 2)
    down = _laid_out(down, decision, 1)
    others = [
        lax.slice_in_dim(down, start, start + value.shape[match.piece.axis], axis=1)
        for value, start in match.piece.others
    ]
    down = lax.slice_in_dim(down, match.piece.start, match.piece.start + width, axis=1)
    down = grouped(down)
    norms = None
    if spec.criterion == "output":
        norms = jnp.linalg.norm(down.astype(jnp.float32), axis=-1)
    fused = tuple(
        PartState(
            tuple(_projected(item, stacker, loops) for item in sibling.projections),
            _vectors(sibling, stacker, loops),
        )
        for sibling in match.region.siblings
    )
    state = FFNState(
        up=jnp.swapaxes(up, 1, 2),
        down=down,
        vectors=tuple(map(grouped, vectors)),
        predictor=predictor,
        fused=fused,
        joined=tuple(others),
        norms=norms,
    )
    return _spread_out(state, decision)


def _laid_out(array: Any, decision: Decision, axis: int) -> Any:
    """Rows along an axis, on the devices that are to have them."""
    spread = decision.found.spread
    return array if spread is None else put_rows(array, spread, axis)


def _spread_out(state: Any, decision: Decision) -> Any:
    """All arrays of a site on the devices that are to have them."""
    spread, rule, spec = decision.found.spread, decision.site.rule, decision.spec
    if spread is None:
        return state
    assert rule is not None
    assert spec is not None
    specs = state_specs(state, spec, rule.predictor, spread)
    return jax.tree.map(lambda array, one: put(array, spread, one), state, specs)


def _order(decision: Decision, kept: jax.Array | None) -> jax.Array | None:
    """i32[layers, G]: the groups with the most common ones first; None if they stay as they are.

    Among the common ones and among the others they keep the order of the model.
    """
    spec = decision.spec
    assert isinstance(spec, FFNSpec)
    if not spec.common_groups:
        return None
    if kept is None:
        raise HireRewriteError(
            f"{decision.found.name}: common neurons are those that calibration found most active: "
            "give pack(..., calibration=batches), or common=0"
        )
    kept = jnp.repeat(kept, decision.found.experts, axis=0)
    best = jnp.argsort(-kept, axis=1, stable=True)
    common = jnp.sort(best[:, : spec.common_groups], axis=1)
    return jnp.concatenate([common, jnp.sort(best[:, spec.common_groups :], axis=1)], axis=1)


def _rows(
    linear: Linear, stacker: Stacker, loops: tuple[Scope, ...], expert: int | None = None
) -> jax.Array:
    """A layer's weight as [layers · experts, out, in], as narrow as the model stores it.

    Args:
      expert: the weight's axis of experts, if it has one.
    """
    weight = stacker.stack(narrow(linear.weight), loops)
    first = () if expert is None else (expert,)
    order = (*first, *(a for a, _ in linear.free if a != expert), *linear.weight_in)
    unit = (axis for axis in range(len(linear.weight.shape)) if axis not in order)
    rows = jnp.transpose(weight, (0, *(axis + 1 for axis in (*order, *unit))))
    experts = 1 if expert is None else linear.weight.shape[expert]
    return rows.reshape(rows.shape[0] * experts, -1, linear.in_dim)


def _projected(projection: Projection, stacker: Stacker, loops: tuple[Scope, ...]) -> jax.Array:
    """The rows of a layer that a projection reads, [layers · experts, n, in]."""
    linear = projection.linear
    expert = _expert(linear.expert_axes(projection.window))
    rows = _rows(linear, stacker, loops, expert)
    free = [(axis, out) for axis, out in linear.free if axis != expert]
    rows = rows.reshape(rows.shape[0], *(linear.weight.shape[axis] for axis, _ in free), -1)
    for i, (axis, out) in enumerate(free):
        if axis == projection.weight_axis or axis in projection.weight_picks:
            start, stop, stride = projection.window.cut(out)
            rows = lax.slice_in_dim(rows, start, stop, stride, axis=i + 1)
    return rows.reshape(rows.shape[0], projection.window.size, linear.in_dim)


def _expert(axes: tuple[int | None, int, int] | None) -> int | None:
    """The weight's axis of experts."""
    return None if axes is None else axes[1]


def _vectors(region: Region, stacker: Stacker, loops: tuple[Scope, ...]) -> tuple[jax.Array, ...]:
    """The numbers of each position of a region, [layers, n]."""
    found = []
    for vector in region.vectors:
        window, array = vector.window, stacker.stack(vector.value, loops)
        array = cut_out(array, window, leading=1)
        found.append(array.reshape(array.shape[0], window.size))
    return tuple(found)


def _fit(
    predictor: Predictor,
    rows: jax.Array,
    moments: Moments | None,
    advance: Callable[[], None],
    top: int | None = None,
) -> Any:
    """The predictor's state for rows [layers, n, d], with a leading axis of layers."""

    def one(rows: jax.Array, moments: Moments | None) -> Any:
        state = jax.block_until_ready(_fit_layer(predictor, top, rows, moments))
        advance()
        return state

    return _each_layer(one, rows, moments)


def _bound(predictor: Predictor, spec: HeadSpec, rows: jax.Array, fitted: Any) -> Any:
    """What a certified head knows about its predictor's errors, with a leading axis of layers."""
    if not spec.certify:
        return {}
    assert isinstance(predictor, Certifying)
    return _each_layer(predictor.fit_bound, rows.astype(spec.compute_dtype), fitted)


def _each_layer(function: Callable[..., Any], rows: jax.Array, more: Any) -> Any:
    """The results of `function` for each layer of rows and of another pytree, stacked."""
    if isinstance(rows, jax.core.Tracer):
        return lax.map(lambda both: function(*both), (rows, more))
    results = []
    for layer in range(rows.shape[0]):
        results.append(function(rows[layer], jax.tree.map(operator.itemgetter(layer), more)))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fit_layer(
    predictor: Predictor, top: int | None, rows: jax.Array, moments: Moments | None
) -> Any:
    """`predictor.fit`, compiled once for all layers and sites of a size."""
    return predictor.fit(rows, moments, top)
