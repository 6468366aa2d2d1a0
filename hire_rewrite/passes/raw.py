"""Sites on the weights as they are: the exact top k in dense arithmetic, and what it looks at.

Mode `"exact"` runs a function with these; calibration runs it with the sites' own results, and has
them report what they saw.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hire_rewrite.graph.calls import CUSTOM_DERIVATIVES
from hire_rewrite.graph.nodes import Frame, Node, Value
from hire_rewrite.graph.view import look_up, run_node
from hire_rewrite.ops.ffn.activity import activity
from hire_rewrite.ops.ffn.block import FFNSpec
from hire_rewrite.ops.ffn.ffn import topk_mask
from hire_rewrite.ops.ffn.importance import importance
from hire_rewrite.ops.head import head as head_ops
from hire_rewrite.ops.moments import Moments
from hire_rewrite.passes.decide import Decision
from hire_rewrite.passes.trace import Trace
from hire_rewrite.patterns.window import Window
from hire_rewrite.sites.ffn.match import FFNMatch
from hire_rewrite.sites.head.epilogue import endpoint_values, endpoints_of
from hire_rewrite.sites.head.match import HeadMatch
from hire_rewrite.sites.layout import cut_out, from_rows, to_rows
from hire_rewrite.sites.replacement import SiteReplacement
from hire_rewrite.sites.weights import site_loops

__all__ = ["observed", "raw_replacement"]


@dataclasses.dataclass(frozen=True, eq=False)
class _Raw:
    """The nodes of a site and what they read."""

    match: FFNMatch | HeadMatch
    nodes: tuple[Node, ...]
    made: frozenset[Value]
    inputs: tuple[Value, ...]

    @classmethod
    def of(cls, match: FFNMatch | HeadMatch) -> _Raw:
        nodes = sorted(match.nodes, key=lambda node: node.index)
        made = {value for node in nodes for value in node.outs}
        read = [value for node in nodes for value in node.ins if value not in made]
        found = dict.fromkeys(v for v in read if v.literal is None and v.const is None)
        return cls(match, tuple(nodes), frozenset(made), tuple(found))

    def hidden(self, ins: Sequence[Any]) -> dict[Value, Any]:
        """All values of a block up to its hidden activations."""
        assert isinstance(self.match, FFNMatch)
        env = dict(zip(self.inputs, ins, strict=True))
        front = [node for node in self.nodes if node not in self.match.tail]
        for step in _steps(front, {*self.inputs, *self.made}):
            run_node(step, env)
        return env

    def down(self, env: Mapping[Value, Any], hidden: Any) -> Any:
        """The block's result for other activations, [tokens, f]."""
        assert isinstance(self.match, FFNMatch)
        region = self.match.region
        rows = from_rows(hidden, region.value.shape, (region.axis,))
        env = {**env, region.value: rows}
        for node in self.match.tail:
            run_node(node, env)
        return env[self.match.down.out]

    def rank(self, env: Mapping[Value, Any], spec: FFNSpec) -> tuple[Any, Any]:
        """The activations [tokens, f] and what ranks their groups, f32[tokens, G]."""
        match = self.match
        assert isinstance(match, FFNMatch)
        region = match.region
        hidden = to_rows(env[region.value], (region.axis,))
        pre: tuple[Any, ...] = ()
        vectors: tuple[Any, ...] = ()
        known: dict[Value, Any] = {}
        if spec.criterion == "gate" and spec.projections > 1:
            pre = tuple(
                _taken(look_up(item.linear.out, env), item.window) for item in region.projections
            )
            vectors = tuple(
                _taken(look_up(item.value, env), item.window)[0] for item in region.vectors
            )
            known = {side: look_up(side, env) for side in region.sides}
        norms = _norms(match, env) if spec.criterion == "output" else None
        rank = importance(hidden, pre, vectors, norms, spec, lambda p, v: region.run(p, v, known))
        return hidden, rank


def raw_replacement(decision: Decision) -> SiteReplacement:
    """The exact top-k of a site in dense arithmetic on the weights as they are (mode "exact")."""
    match, spec = decision.found.match, decision.spec
    raw = _Raw.of(match)

    def exact_ffn(ins: Sequence[Any]) -> Sequence[Any]:
        assert isinstance(spec, FFNSpec)
        env = raw.hidden(ins)
        hidden, rank = raw.rank(env, spec)
        kept = jnp.where(topk_mask(rank, spec), hidden, jnp.zeros_like(hidden))
        return [raw.down(env, kept)]

    def exact_head(ins: Sequence[Any]) -> Sequence[Any]:
        assert isinstance(match, HeadMatch)
        assert isinstance(spec, head_ops.HeadSpec)
        env = dict(zip(raw.inputs, ins, strict=True))
        run_node(match.linear.node, env)
        rows = to_rows(env[match.linear.out], (match.axis,))
        endpoints = endpoints_of(match, {v: look_up(v, env) for v in match.sides})
        return endpoint_values(match, head_ops.exact_head(rows, spec=spec, endpoints=endpoints))

    body = exact_ffn if isinstance(match, FFNMatch) else exact_head
    name = decision.found.name
    return SiteReplacement(
        name, match.nodes, raw.inputs, match.outputs, lambda ins, *_: jax.jit(body)(ins)
    )


def observed(trace: Trace, decision: Decision, *, shares: bool) -> SiteReplacement:
    """A block as it is, which reports the moments of its input and its `Activity`."""
    match, spec = decision.found.match, decision.spec
    assert isinstance(match, FFNMatch)
    assert isinstance(spec, FFNSpec)
    raw = _Raw.of(match)
    inputs = tuple(dict.fromkeys((*raw.inputs, match.x)))

    def run(ins: Sequence[Any], *_: Any) -> tuple[Sequence[Any], Any]:
        known = dict(zip(inputs, ins, strict=True))
        env = raw.hidden([known[value] for value in raw.inputs])
        hidden, rank = raw.rank(env, spec)

        def down(h: Any) -> Any:
            return to_rows(raw.down(env, h), match.down.out_axes)

        seen = activity(hidden, rank, spec, down, shares=shares)
        moments = Moments.of(to_rows(known[match.x], match.x_axes))
        return [raw.down(env, hidden)], (moments, seen)

    return SiteReplacement(
        decision.found.name,
        match.nodes,
        inputs,
        match.outputs,
        run,
        shards=decision.found.shards,
        loops=site_loops(trace, match),
        reports=True,
    )


def _taken(array: Any, window: Window) -> Any:
    """[tokens, n]: an array in a window."""
    assert window.axis is not None
    return to_rows(cut_out(array, window), (window.axis,))


def _norms(match: FFNMatch, env: Mapping[Value, Any]) -> Any:
    """f32[f]: the norms of the rows of a block's last matrix."""
    linear = match.down
    weight = look_up(linear.weight, env).astype(jnp.float32)
    rows = jnp.moveaxis(weight, linear.weight_in, range(len(linear.weight_in)))
    rows = rows.reshape(linear.in_dim, -1)
    norms = jnp.sqrt(jnp.square(rows).sum(-1))
    return lax.slice_in_dim(norms, match.piece.start, match.piece.start + match.region.size)


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
