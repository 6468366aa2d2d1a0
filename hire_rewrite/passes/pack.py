"""Lay out the weights of the sites for gathering, and fit their predictors.

Everything that depends on weights alone is computed here, once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.learned import Learned, Learnings
from hire_rewrite.ops.block import FFNSpec, FFNState, PartState
from hire_rewrite.ops.head import HeadSpec, HeadState
from hire_rewrite.ops.moments import Moments
from hire_rewrite.ops.predictors import Certifying, Predictor
from hire_rewrite.ops.spread import state_specs
from hire_rewrite.packed import Origin, Packed
from hire_rewrite.passes.decide import Decision
from hire_rewrite.passes.placement import on_mesh, put, put_rows
from hire_rewrite.passes.replace import packed_replacements
from hire_rewrite.passes.rewrite import rewrite
from hire_rewrite.passes.rows import cut_out
from hire_rewrite.passes.trace import Trace, abstract
from hire_rewrite.passes.weights import Stacker, layers, narrow, site_loops
from hire_rewrite.patterns.graph import Scope
from hire_rewrite.patterns.head import HeadMatch
from hire_rewrite.patterns.linear import Linear
from hire_rewrite.patterns.region import Projection, Region

__all__ = ["Calibration", "fingerprint", "pack"]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What calibration saw, by the name of a site's packed state.

    Attributes:
      moments: of the sites' inputs, with one leading axis of layers.
      kept: f32[layers, G] of blocks, how often each group was among the k greatest.
      learned: static numbers, by the name of the site.
    """

    moments: Mapping[str, Moments] = dataclasses.field(default_factory=dict)
    kept: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    learned: Mapping[str, Learned] = dataclasses.field(default_factory=dict)

    @property
    def learnings(self) -> Learnings:
        """`learned` as a part of a `Packed`'s type."""
        return tuple(sorted(self.learned.items()))


def fingerprint(decisions: Sequence[Decision], origin: Origin) -> str:
    """A short hash of everything that the layout of a `Packed` depends on."""
    lines = [f"{path} {spec.dtype}{list(spec.shape)}" for path, spec in _leaves(origin)]
    for decision in decisions:
        if decision.packs:
            lines.append(f"{decision.state} {decision.spec} {decision.site.rule}")
    return hashlib.sha256("\n".join(dict.fromkeys(lines)).encode()).hexdigest()[:12]


def pack(
    trace: Trace,
    decisions: Sequence[Decision],
    origin: Origin,
    weights: Sequence[Any],
    calibration: Calibration,
) -> Packed:
    """Pack the weights of a traced function.

    Args:
      weights: its weight inputs, in order.
      calibration: sites that it has no moments of have predictors fitted to the weights alone.

    Raises:
      HireRewriteError: a site's weights hold a NaN or an infinity, its calibration has too few
        tokens for its predictor, or its rule needs calibration and there is none.
    """
    arrays = dict(zip(trace.weights, weights, strict=True))
    stacker = Stacker({trace.scope.inputs[i]: array for i, array in arrays.items()})
    packing = [decision for decision in decisions if decision.packs]
    firsts = [decision for decision in packing if decision.state == decision.found.name]
    total = sum(layers(site_loops(trace, d.found.match)) * d.found.experts for d in firsts)
    states: dict[str, Any] = {}
    with _progress(total) as advance:
        for decision in firsts:
            name, loops = decision.found.name, site_loops(trace, decision.found.match)
            states[name] = _state(decision, stacker, loops, calibration, advance)
    swaps = [
        swap for d in packing for swap in packed_replacements(trace, d, states[d.state], "hire", {})
    ]
    needs = rewrite(trace, swaps).needs
    kept = {trace.paths[i]: jnp.asarray(array) for i, array in arrays.items() if i in needs}
    spreads = [decision.found.spread for decision in packing if decision.found.spread]
    if spreads:  # all on the same devices
        kept, states = jax.tree.map(lambda array: on_mesh(array, spreads[0]), (kept, states))
    layout = tuple(map(abstract, jax.tree.leaves((kept, states))))
    name = fingerprint(decisions, origin)
    return Packed(kept, states, name, origin, layout, calibration.learnings)


def _state(
    decision: Decision,
    stacker: Stacker,
    loops: tuple[Scope, ...],
    calibration: Calibration,
    advance: Callable[[], None],
) -> Any:
    name, match, rule = decision.found.name, decision.found.match, decision.site.rule
    assert rule is not None
    moments = calibration.moments.get(name)
    spec = decision.spec
    if isinstance(match, HeadMatch):
        assert isinstance(spec, HeadSpec)
        rows = _rows(match.linear, stacker, loops)
        rows = jnp.pad(rows, ((0, 0), (0, spec.rows - spec.width), (0, 0)))
        rows = _laid_out(rows, decision, 1)
        fitted = _fit(name, rule.predictor, rows, moments, advance, spec.candidates)
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
    order = _order(decision, calibration, count)

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
    predictor = _fit(name, rule.predictor, scored, moments, advance)
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


def _order(decision: Decision, calibration: Calibration, layers: int) -> jax.Array | None:
    """i32[layers, G]: the groups with the most common ones first; None if they stay as they are.

    Among the common ones and among the others they keep the order of the model.
    """
    name, spec = decision.found.name, decision.spec
    assert isinstance(spec, FFNSpec)
    if not spec.common_groups:
        return None
    if name not in calibration.kept:
        raise HireRewriteError(
            f"{name}: common neurons are those that calibration found most active: give "
            "pack(..., calibration=batches), or common=0"
        )
    kept = jnp.repeat(calibration.kept[name], decision.found.experts, axis=0)
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
    name: str,
    predictor: Predictor,
    rows: jax.Array,
    moments: Moments | None,
    advance: Callable[[], None],
    top: int | None = None,
) -> Any:
    """The predictor's state for rows [layers, n, d], with a leading axis of layers."""
    if not isinstance(rows, jax.core.Tracer):
        if not bool(jnp.isfinite(rows).all()):
            raise HireRewriteError(
                f"{name}: its weights hold a NaN or an infinity, for which nothing can be "
                "predicted: look at the weights, or exclude the site with a rule's path="
            )
        if moments is not None:
            tokens = int(moments.count.min())
            predictor.check(rows.shape[1], rows.shape[2], site=name, tokens=tokens)

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


def _leaves(origin: Origin) -> Iterator[tuple[str, jax.ShapeDtypeStruct]]:
    return zip(origin.paths, origin.specs, strict=True)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A progress bar for packing that takes seconds, where tqdm is installed."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        yield lambda: None
        return
    with tqdm(total=total, desc="packing", unit="layer", delay=2.0, leave=False) as bar:
        yield lambda: bar.update() and None
