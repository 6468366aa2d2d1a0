"""Lay out the weights of the sites for gathering, and fit their predictors.

Everything that depends on weights alone is computed here, once.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hire_rewrite.ops.ffn import FFNSpec, FFNState, PartState
from hire_rewrite.ops.head import HeadState
from hire_rewrite.ops.moments import Moments
from hire_rewrite.ops.predictors import Predictor
from hire_rewrite.packed import Origin, Packed
from hire_rewrite.passes.decide import Decision
from hire_rewrite.passes.replace import packed_replacements
from hire_rewrite.passes.rewrite import rewrite
from hire_rewrite.passes.trace import Trace, abstract
from hire_rewrite.passes.weights import Stacker, layers, narrow, site_loops
from hire_rewrite.patterns.graph import Scope
from hire_rewrite.patterns.head import HeadMatch
from hire_rewrite.patterns.linear import Linear
from hire_rewrite.patterns.region import Projection, Region

__all__ = ["fingerprint", "pack"]


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
    moments: Mapping[str, Moments],
) -> Packed:
    """Pack the weights of a traced function.

    Args:
      weights: its weight inputs, in order.
      moments: of the inputs of sites, by state, with one leading axis (see `calibrate`); sites
        without them have predictors fitted to the weights alone.
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
            states[name] = _state(decision, stacker, loops, moments.get(name), advance)
    swaps = [
        swap for d in packing for swap in packed_replacements(trace, d, states[d.state], "hire", {})
    ]
    needs = rewrite(trace, swaps).needs
    kept = {trace.paths[i]: jnp.asarray(array) for i, array in arrays.items() if i in needs}
    layout = tuple(map(abstract, jax.tree.leaves((kept, states))))
    return Packed(kept, states, fingerprint(decisions, origin), origin, layout)


def _state(
    decision: Decision,
    stacker: Stacker,
    loops: tuple[Scope, ...],
    moments: Moments | None,
    advance: Callable[[], None],
) -> Any:
    match, rule = decision.found.match, decision.site.rule
    assert rule is not None
    if isinstance(match, HeadMatch):
        rows = _rows(match.linear, stacker, loops)
        return HeadState(rows, _fit(rule.predictor, rows, moments, advance))
    spec = decision.spec
    assert isinstance(spec, FFNSpec)
    width, group = spec.width, spec.group
    if moments is not None:  # experts are told apart by their weights alone
        moments = jax.tree.map(lambda leaf: jnp.repeat(leaf, match.experts, axis=0), moments)
    up = jnp.stack([_projected(item, stacker, loops) for item in match.region.projections], axis=1)
    count, projections, _, d_in = up.shape
    predictor = _fit(rule.predictor, up.reshape(count, projections * width, d_in), moments, advance)
    vectors = _vectors(match.region, stacker, loops)
    expert = _expert(match.down.expert_axes())
    down = jnp.swapaxes(_rows(match.down, stacker, loops, expert), 1, 2)
    others = [
        lax.slice_in_dim(down, start, start + value.shape[match.piece.axis], axis=1)
        for value, start in match.piece.others
    ]
    down = lax.slice_in_dim(down, match.piece.start, match.piece.start + width, axis=1)
    groups = width // group
    fused = tuple(
        PartState(
            tuple(_projected(item, stacker, loops) for item in sibling.projections),
            _vectors(sibling, stacker, loops),
        )
        for sibling in match.region.siblings
    )
    return FFNState(
        up=jnp.swapaxes(up.reshape(count, projections, groups, group, d_in), 1, 2),
        down=down.reshape(count, groups, group, -1),
        vectors=tuple(vector.reshape(count, groups, group) for vector in vectors),
        predictor=predictor,
        fused=fused,
        joined=tuple(others),
    )


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
        assert window.axis is not None
        for axis in (window.axis, *window.picked):
            start, stop, stride = window.cut(axis)
            array = lax.slice_in_dim(array, start, stop, stride, axis=axis + 1)
        found.append(array.reshape(array.shape[0], window.size))
    return tuple(found)


def _fit(
    predictor: Predictor,
    rows: jax.Array,
    moments: Moments | None,
    advance: Callable[[], None],
) -> Any:
    """The predictor's state for rows [layers, n, d], with a leading axis of layers."""
    states = []
    for layer in range(rows.shape[0]):
        one = operator.itemgetter(layer)
        here = None if moments is None else jax.tree.map(one, moments)
        states.append(jax.block_until_ready(_fit_layer(predictor, rows[layer], here)))
        advance()
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


@functools.partial(jax.jit, static_argnums=0)
def _fit_layer(predictor: Predictor, rows: jax.Array, moments: Moments | None) -> Any:
    """`predictor.fit`, compiled once for all layers and sites of a size."""
    return predictor.fit(rows, moments)


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
