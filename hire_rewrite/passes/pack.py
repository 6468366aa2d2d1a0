"""Lay out the weights of the sites for gathering, and fit their predictors.

Everything that depends on weights alone is computed here, once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.graph.nodes import Scope
from hire_rewrite.learned import Learned, Learnings
from hire_rewrite.ops.ffn.block import FFNState
from hire_rewrite.ops.head.head import HeadState
from hire_rewrite.ops.moments import Moments
from hire_rewrite.packed import Origin, Packed
from hire_rewrite.passes.decide import Decision
from hire_rewrite.passes.replace import packed_replacements
from hire_rewrite.passes.rewrite import rewrite
from hire_rewrite.passes.sizes import scored_rows
from hire_rewrite.passes.state import site_state
from hire_rewrite.passes.trace import Trace, abstract
from hire_rewrite.sharding.manual import on_each_device
from hire_rewrite.sharding.placement import on_mesh
from hire_rewrite.sites.weights import Stacked, Stacker, layers, site_loops

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
            shards = f" in shard_map: {decision.found.shards}" if decision.found.shards else ""
            lines.append(f"{decision.state} {decision.spec} {decision.site.rule}{shards}")
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
    stacker = Stacker({trace.scope.inputs[i]: Stacked(array, ()) for i, array in arrays.items()})
    packing = [decision for decision in decisions if decision.packs]
    firsts = [decision for decision in packing if decision.state == decision.found.name]
    total = sum(layers(site_loops(trace, d.found.match)) * d.found.experts for d in firsts)
    states: dict[str, Any] = {}
    with _progress(total) as advance:
        for decision in firsts:
            name, loops = decision.found.name, site_loops(trace, decision.found.match)
            _check_tokens(decision, calibration)
            states[name] = _placed_state(decision, stacker, loops, calibration, advance)
            _check_finite(name, states[name])
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


def _placed_state(
    decision: Decision,
    stacker: Stacker,
    loops: tuple[Scope, ...],
    calibration: Calibration,
    advance: Callable[[], None],
) -> Any:
    """A site's state; inside a `shard_map` of the function's, that of each device's own weights."""
    name, shards = decision.found.name, decision.found.shards
    moments, kept = calibration.moments.get(name), calibration.kept.get(name)
    if shards is None:
        return site_state(decision, stacker, loops, moments, kept, advance)

    def own(stacker: Stacker, seen: Any) -> Any:
        moments, kept = seen
        return site_state(decision, stacker, loops, moments, kept, lambda: None)

    state = jax.block_until_ready(on_each_device(shards, stacker, own, (moments, kept)))
    for _ in range(layers(loops) * decision.found.experts):
        advance()
    return state


def _check_tokens(decision: Decision, calibration: Calibration) -> None:
    """Raise HireRewriteError if a predictor is to be fitted to fewer tokens than it needs."""
    name, spec, rule = decision.found.name, decision.spec, decision.site.rule
    moments = calibration.moments.get(name)
    assert spec is not None
    assert rule is not None
    if moments is not None:
        d_in, tokens = decision.found.match.linears[0].in_dim, int(moments.count.min())
        rule.predictor.check(scored_rows(spec), d_in, site=name, tokens=tokens)


def _check_finite(name: str, state: FFNState | HeadState) -> None:
    """Raise HireRewriteError if a site's rows hold a NaN or an infinity."""
    rows = state.rows if isinstance(state, HeadState) else state.up
    if not isinstance(rows, jax.core.Tracer) and not bool(jnp.isfinite(rows).all()):
        raise HireRewriteError(
            f"{name}: its weights hold a NaN or an infinity, for which nothing can be "
            "predicted: look at the weights, or exclude the site with a rule's path="
        )


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
