"""What takes the place of a site: the operations of `ops`, laid out as the function has it.

`ops` works on `[tokens, d]`. Here the axes of the traced values are moved to that form and back,
and the code between the products, which `ops` calls an activation or endpoints, is the function's
own, run again on the rows that were fetched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.ops import ffn as ffn_ops
from hire_rewrite.ops import head as head_ops
from hire_rewrite.passes.calls import CUSTOM_DERIVATIVES
from hire_rewrite.passes.decide import Decision
from hire_rewrite.passes.experts import side_by_side
from hire_rewrite.passes.rows import from_rows, to_rows
from hire_rewrite.passes.trace import Trace
from hire_rewrite.passes.view import evaluate, look_up
from hire_rewrite.passes.weights import site_loops
from hire_rewrite.patterns.ffn import FFNMatch
from hire_rewrite.patterns.graph import Frame, Node, Scope, Value
from hire_rewrite.patterns.head import HeadMatch

__all__ = ["Functions", "SiteReplacement", "packed_replacements", "raw_replacement"]


@dataclasses.dataclass(frozen=True, eq=False)
class SiteReplacement:
    """A `Replacement` made of one function of the arrays that stand for `inputs`."""

    name: str
    nodes: frozenset[Node]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    run: Callable[[Sequence[Any], Any], Sequence[Any]]
    loops: tuple[Scope, ...] = ()
    reports: bool = False

    def emit(self, ins: Sequence[Any], index: Mapping[Scope, Any]) -> tuple[list[Any], Any]:
        results = list(self.run(ins, _layer_of(self.loops, index)))
        for value, result in zip(self.outputs, results, strict=True):
            got = jax.typeof(result)
            if (got.shape, got.dtype) != (value.shape, value.dtype):
                raise HireRewriteError(
                    f"{self.name}: its replacement returns {got.str_short()} where the function "
                    f"has {value.aval.str_short()}; this is a bug of hire_rewrite: exclude the "
                    "site with a rule's path= and report it"
                )
        return results, None


def _layer_of(loops: Sequence[Scope], index: Mapping[Scope, Any]) -> Any:
    """The number of the current iteration among all of the scans `loops`, i32[]."""
    if not loops:
        return np.int32(0)
    layer = index[loops[0]]
    for scope in loops[1:]:
        layer = layer * scope.length + index[scope]
    return layer


Functions = dict[Hashable, Callable[..., Any]]
"""Jitted functions of blocks, by what they compute: layers that are alike are traced once."""


def packed_replacements(
    trace: Trace, decision: Decision, state: Any, mode: str, functions: Functions
) -> list[SiteReplacement]:
    """The replacement of a packed site, and one of the parts of a product that it shares.

    Args:
      state: the site's entry of `Packed.sites`.
      mode: `"hire"`, `"exact"` or `"dense"`.
      functions: those of sites before.
    """
    match = decision.found.match
    predict = mode == "hire" and decision.rewritten
    if isinstance(match, FFNMatch):
        run = _ffn(match, decision, state, mode, predict, functions)
    else:
        run = _head(match, decision, state, mode, predict)
    loops = site_loops(trace, match)
    name = decision.found.name
    found = [SiteReplacement(name, match.nodes, match.inputs, match.outputs, run, loops)]
    if isinstance(match, FFNMatch) and match.shared:
        found.append(_shared(name, match, decision, state, loops))
    return found


def _shared(
    name: str, match: FFNMatch, decision: Decision, state: Any, loops: tuple[Scope, ...]
) -> SiteReplacement:
    """The other parts of a fused product, from rows of their own."""
    siblings, spec = match.region.siblings, decision.spec
    assert isinstance(spec, ffn_ops.FFNSpec)
    sides = tuple(dict.fromkeys(side for sibling in siblings for side in sibling.sides))

    def run(ins: Sequence[Any], layer: Any) -> Sequence[Any]:
        x, *arrays = ins
        rows, known = to_rows(x, match.x_axes), dict(zip(sides, arrays, strict=True))
        results = []
        for sibling, part in zip(siblings, state.fused, strict=True):
            pre, vectors = ffn_ops.part_inputs(rows, part, layer, spec=spec)
            result = sibling.run(pre, vectors, known)
            results.append(from_rows(result, sibling.value.shape, (sibling.axis,)))
        return results

    outputs = tuple(sibling.value for sibling in siblings)
    return SiteReplacement(f"{name} (fused)", match.shared, (match.x, *sides), outputs, run, loops)


def _ffn(
    match: FFNMatch,
    decision: Decision,
    state: Any,
    mode: str,
    predict: bool,
    functions: Functions,
) -> Callable[[Sequence[Any], Any], Sequence[Any]]:
    spec, rule, region = decision.spec, decision.site.rule, match.region
    assert isinstance(spec, ffn_ops.FFNSpec)
    assert rule is not None

    count = len(region.sides)

    def block(x: Any, state: Any, layer: Any, activation: ffn_ops.Activation) -> Any:
        if predict:
            return ffn_ops.hire_ffn(
                x, state, layer, spec=spec, activation=activation, predictor=rule.predictor
            )
        op = ffn_ops.dense_ffn if mode == "dense" else ffn_ops.exact_ffn
        return op(x, state, layer, spec=spec, activation=activation)

    def hire_ffn(x: Any, ins: Sequence[Any], state: Any, layer: Any) -> Any:
        known = dict(zip(region.sides, ins[:count], strict=True))
        others = [to_rows(other, (match.piece.axis,)) for other in ins[count:]]
        y = block(x, state, layer, lambda pre, vectors: region.run(pre, vectors, known))
        return ffn_ops.add_joined(y, others, state, layer, spec=spec)

    key = (region.signature, match.piece.axis, spec, rule.predictor, mode, predict)
    if match.experts > 1:
        return side_by_side(match, state, block, functions, key)
    jitted = functions.setdefault(key, jax.jit(hire_ffn))

    def run(ins: Sequence[Any], layer: Any) -> Sequence[Any]:
        x, *rest = ins
        y = jitted(to_rows(x, match.x_axes), rest, state, layer)
        return [from_rows(y, match.down.out.shape, match.down.out_axes)]

    return run


def _head(
    match: HeadMatch, decision: Decision, state: Any, mode: str, predict: bool
) -> Callable[[Sequence[Any], Any], Sequence[Any]]:
    spec, rule = decision.spec, decision.site.rule
    assert isinstance(spec, head_ops.HeadSpec)
    assert rule is not None

    def hire_head(x: Any, sides: Sequence[Any], state: Any, layer: Any) -> Any:
        endpoints = _endpoints(match, dict(zip(match.sides, sides, strict=True)))
        if predict:
            return head_ops.hire_head(
                x, state, layer, spec=spec, endpoints=endpoints, predictor=rule.predictor
            )
        if mode == "dense":
            return head_ops.dense_head(x, state, layer, spec=spec, endpoints=endpoints)
        (raw,) = head_ops.dense_head(x, state, layer, spec=spec, endpoints=lambda z: (z,))
        return head_ops.exact_head(raw, spec=spec, endpoints=endpoints)

    def run(ins: Sequence[Any], layer: Any) -> Sequence[Any]:
        x, *sides = ins
        rows = to_rows(x, match.linear.x_axes)
        results = jax.jit(hire_head)(rows, sides, state, layer)
        return _endpoint_values(match, results)

    return run


def raw_replacement(decision: Decision) -> SiteReplacement:
    """The exact top-k of a site in dense arithmetic on the weights as they are (mode "exact")."""
    match, spec = decision.found.match, decision.spec
    nodes = sorted(match.nodes, key=lambda node: node.index)
    made = {value for node in nodes for value in node.outs}
    read = (value for node in nodes for value in node.ins if value not in made)
    inputs = tuple(dict.fromkeys(v for v in read if v.literal is None and v.const is None))

    def exact_ffn(ins: Sequence[Any]) -> Sequence[Any]:
        assert isinstance(match, FFNMatch)
        assert isinstance(spec, ffn_ops.FFNSpec)
        env = dict(zip(inputs, ins, strict=True))
        for step in _steps([n for n in nodes if n not in match.tail], {*inputs, *made}):
            _step(step, env)
        region = match.region
        hidden = to_rows(env[region.value], (region.axis,))
        kept = jnp.where(ffn_ops.topk_mask(hidden, spec), hidden, jnp.zeros_like(hidden))
        env[region.value] = from_rows(kept, region.value.shape, (region.axis,))
        for node in match.tail:
            _step(node, env)
        return [env[match.down.out]]

    def exact_head(ins: Sequence[Any]) -> Sequence[Any]:
        assert isinstance(match, HeadMatch)
        assert isinstance(spec, head_ops.HeadSpec)
        env = dict(zip(inputs, ins, strict=True))
        _step(match.linear.node, env)
        raw = to_rows(env[match.linear.out], (match.axis,))
        endpoints = _endpoints(match, {v: look_up(v, env) for v in match.sides})
        return _endpoint_values(match, head_ops.exact_head(raw, spec=spec, endpoints=endpoints))

    body = exact_ffn if isinstance(match, FFNMatch) else exact_head
    return SiteReplacement(
        decision.found.name, match.nodes, inputs, match.outputs, lambda ins, _: jax.jit(body)(ins)
    )


def _endpoints(match: HeadMatch, sides: Mapping[Value, Any]) -> head_ops.Endpoints:
    """The function's own code behind the logits, from [tokens, V] to [tokens, V]."""

    def run(raw: Any) -> tuple[Any, ...]:
        linear = match.linear
        env = {**sides, linear.out: from_rows(raw, linear.out.shape, (match.axis,))}
        for node in match.chain:
            _step(node, env)
        return tuple(to_rows(env[v], match.places[v][:1]) for v in match.endpoints)

    return run


def _endpoint_values(match: HeadMatch, results: Sequence[Any]) -> list[Any]:
    return [
        from_rows(rows, value.shape, match.places[value][:1])
        for value, rows in zip(match.endpoints, results, strict=True)
    ]


def _steps(nodes: Sequence[Node], known: set[Value]) -> list[Node | Frame]:
    """Nodes in order, those of a call with a derivative of its own as that call."""
    inside, steps = set(nodes), dict[Node | Frame, None]()
    for node in nodes:
        step: Node | Frame = node
        frame: Frame | None = node.frame
        while frame is not None and frame.eqn is not None:
            reads = (v for v in frame.ins if v.literal is None and v.const is None)
            whole = inside.issuperset(frame.nodes()) and known.issuperset(reads)
            if whole and frame.eqn.primitive in CUSTOM_DERIVATIVES:
                step = frame
            frame = frame.parent
        steps[step] = None
    return list(steps)


def _step(node: Node | Frame, env: dict[Value, Any]) -> None:
    results = evaluate(node, [look_up(value, env) for value in node.ins])
    env.update(zip(node.outs, results, strict=True))
