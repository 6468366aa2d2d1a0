"""What takes the place of a site: the operations of `ops`, laid out as the function has it.

`ops` works on `[tokens, d]`. Here the axes of the traced values are moved to that form and back,
and the code between the products, which `ops` calls an activation or endpoints, is the function's
own, run again on the rows that were fetched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax

from hire_rewrite.graph.nodes import Scope
from hire_rewrite.ops.ffn import ffn as ffn_ops
from hire_rewrite.ops.ffn.block import Activation, FFNSpec
from hire_rewrite.ops.ffn.products import add_joined, part_inputs
from hire_rewrite.ops.ffn.sharded import spread_ffn
from hire_rewrite.ops.head import head as head_ops
from hire_rewrite.ops.head.sharded import spread_head
from hire_rewrite.ops.quality import measured_ffn, measured_head
from hire_rewrite.passes.decide import Decision
from hire_rewrite.passes.trace import Trace
from hire_rewrite.sites.ffn.experts import side_by_side
from hire_rewrite.sites.ffn.match import FFNMatch
from hire_rewrite.sites.head.epilogue import endpoint_values, endpoints_of
from hire_rewrite.sites.head.match import HeadMatch
from hire_rewrite.sites.head.top_k import searches
from hire_rewrite.sites.layout import from_rows, to_rows
from hire_rewrite.sites.replacement import SiteReplacement
from hire_rewrite.sites.weights import site_loops

__all__ = ["Functions", "packed_replacements"]

_MEASURED = ("measure", "measure exact")

_FFN_OPS: dict[str, Callable[..., Any]] = {
    "hire": ffn_ops.hire_ffn,
    "exact": ffn_ops.exact_ffn,
    "dense": ffn_ops.dense_ffn,
    "measure": functools.partial(measured_ffn, follow="hire"),
    "measure exact": functools.partial(measured_ffn, follow="exact"),
}

Functions = dict[Hashable, Callable[..., Any]]
"""Jitted functions of blocks, by what they compute: layers that are alike are traced once."""


def packed_replacements(
    trace: Trace, decision: Decision, state: Any, mode: str, functions: Functions
) -> list[SiteReplacement]:
    """The replacement of a packed site, and those of what belongs to it: the parts of a product
    that a block shares, and what looks for a head's greatest logits.

    Args:
      state: the site's entry of `Packed.sites`.
      mode: `"hire"`, `"exact"` or `"dense"`; or, to report `ops.quality.Quality` as well,
        `"measure"`, which goes on with what hire computes, or `"measure exact"`.
      functions: those of sites before.
    """
    match = decision.found.match
    if mode == "hire" and not decision.rewritten:
        mode = "exact"
    reports = mode in _MEASURED
    if isinstance(match, FFNMatch):
        run = _ffn(match, decision, mode, functions)
    else:
        run = _head(match, decision, mode)
    name, shards, loops = decision.found.name, decision.found.shards, site_loops(trace, match)
    nodes, outputs = match.nodes, match.outputs
    found = [
        SiteReplacement(name, nodes, match.inputs, outputs, run, state, shards, loops, reports)
    ]
    if isinstance(match, FFNMatch) and match.shared:
        found.append(_shared(name, match, decision, state, loops))
    spread, spec = decision.found.spread, decision.spec
    if mode == "hire" and isinstance(match, HeadMatch):
        assert isinstance(spec, head_ops.HeadSpec)
        found += searches(name, match, spread, shards, spec.recall_target)
    return found


def _shared(
    name: str, match: FFNMatch, decision: Decision, state: Any, loops: tuple[Scope, ...]
) -> SiteReplacement:
    """The other parts of a fused product, from rows of their own."""
    siblings, spec = match.region.siblings, decision.spec
    assert isinstance(spec, FFNSpec)
    sides = tuple(dict.fromkeys(side for sibling in siblings for side in sibling.sides))

    def run(ins: Sequence[Any], layer: Any, state: Any) -> Sequence[Any]:
        x, *arrays = ins
        rows, known = to_rows(x, match.x_axes), dict(zip(sides, arrays, strict=True))
        results = []
        for sibling, part in zip(siblings, state.fused, strict=True):
            pre, vectors = part_inputs(rows, part, layer, spec=spec)
            result = sibling.run(pre, vectors, known)
            results.append(from_rows(result, sibling.value.shape, (sibling.axis,)))
        return results

    outputs = tuple(sibling.value for sibling in siblings)
    inputs = (match.x, *sides)
    shards = decision.found.shards
    return SiteReplacement(
        f"{name} (fused)", match.shared, inputs, outputs, run, state, shards, loops
    )


def _ffn(
    match: FFNMatch, decision: Decision, mode: str, functions: Functions
) -> Callable[[Sequence[Any], Any, Any], Any]:
    spec, rule, region = decision.spec, decision.site.rule, match.region
    assert isinstance(spec, FFNSpec)
    assert rule is not None
    op, spread = _FFN_OPS[mode], decision.found.spread
    settings: dict[str, Any] = {"spec": spec}
    if mode == "hire" and spread is not None:
        op = functools.partial(spread_ffn, spread=spread, together=bool(region.sides))
    if mode not in ("dense", "exact"):
        settings["predictor"] = rule.predictor
    if mode == "hire":
        settings["budget"] = decision.budget
    count = len(region.sides)

    def block(x: Any, state: Any, layer: Any, activation: Activation) -> Any:
        return op(x, state, layer, activation=activation, **settings)

    def hire_ffn(x: Any, ins: Sequence[Any], state: Any, layer: Any) -> Any:
        known = dict(zip(region.sides, ins[:count], strict=True))
        others = [to_rows(other, (match.piece.axis,)) for other in ins[count:]]
        y = block(x, state, layer, lambda pre, vectors: region.run(pre, vectors, known))
        y, report = y if mode in _MEASURED else (y, None)
        return add_joined(y, others, state, layer, spec=spec), report

    key = (region.signature, match.piece.axis, spec, rule.predictor, mode, decision.budget, spread)
    if match.experts > 1:
        return side_by_side(match, block, functions, key, reports=mode in _MEASURED)
    jitted = functions.setdefault(key, jax.jit(hire_ffn))

    def run(ins: Sequence[Any], layer: Any, state: Any) -> Any:
        x, *rest = ins
        y, report = jitted(to_rows(x, match.x_axes), rest, state, layer)
        results = [from_rows(y, match.down.out.shape, match.down.out_axes)]
        return (results, report) if mode in _MEASURED else results

    return run


def _head(
    match: HeadMatch, decision: Decision, mode: str
) -> Callable[[Sequence[Any], Any, Any], Any]:
    spec, rule, spread = decision.spec, decision.site.rule, decision.found.spread
    assert isinstance(spec, head_ops.HeadSpec)
    assert rule is not None

    def hire_head(x: Any, sides: Sequence[Any], state: Any, layer: Any) -> Any:
        endpoints = endpoints_of(match, dict(zip(match.sides, sides, strict=True)))
        if mode == "hire":
            op = head_ops.hire_head
            if spread is not None:
                op = functools.partial(spread_head, spread=spread)
            return op(x, state, layer, spec=spec, endpoints=endpoints, predictor=rule.predictor)
        if mode in _MEASURED:
            follow = "hire" if mode == "measure" else "exact"
            return measured_head(
                x,
                state,
                layer,
                spec=spec,
                endpoints=endpoints,
                predictor=rule.predictor,
                follow=follow,
            )
        if mode == "dense":
            return head_ops.dense_head(x, state, layer, spec=spec, endpoints=endpoints)
        (raw,) = head_ops.dense_head(x, state, layer, spec=spec, endpoints=lambda z: (z,))
        return head_ops.exact_head(raw, spec=spec, endpoints=endpoints)

    def run(ins: Sequence[Any], layer: Any, state: Any) -> Any:
        x, *sides = ins
        rows = to_rows(x, match.linear.x_axes)
        results = jax.jit(hire_head)(rows, sides, state, layer)
        if mode not in _MEASURED:
            return endpoint_values(match, results)
        values, report = results
        return endpoint_values(match, values), report

    return run
