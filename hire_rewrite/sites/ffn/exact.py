"""A block on its weights as they are, by the model's own code: its top k, and what it looks at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hire_rewrite.graph.calls import inline_call
from hire_rewrite.graph.evaluate import look_up, run_node
from hire_rewrite.graph.nodes import Frame, Node, Value
from hire_rewrite.ops.ffn.activity import activity
from hire_rewrite.ops.ffn.block import FFNSpec
from hire_rewrite.ops.ffn.importance import top_groups
from hire_rewrite.ops.moments import Moments
from hire_rewrite.sites.ffn.match import FFNMatch
from hire_rewrite.sites.kind import MatchedSite
from hire_rewrite.sites.layout import from_tokens, to_tokens
from hire_rewrite.sites.replacement import SiteReplacement


def exact_form(site: MatchedSite, spec: FFNSpec) -> SiteReplacement:
    """The exact top k of a block in dense arithmetic on the weights as they are."""
    block = _Block(site.match)

    def exact_ffn(ins: Sequence[Any]) -> Sequence[Any]:
        env = block.hidden(ins)
        return [block.down(env, top_groups(*block.activations(env, spec), spec))]

    def run(ins: Sequence[Any], *_: Any) -> Sequence[Any]:
        return jax.jit(exact_ffn)(ins)

    return SiteReplacement(site.name, site.match.nodes, block.inputs, site.match.outputs, run)


def observed(site: MatchedSite, spec: FFNSpec, *, shares: bool) -> SiteReplacement:
    """A block as it is, which reports the moments of its input and its `Activity`."""
    match: FFNMatch = site.match
    block = _Block(match)
    inputs = tuple(dict.fromkeys((*block.inputs, match.x)))

    def run(ins: Sequence[Any], *_: Any) -> tuple[Sequence[Any], Any]:
        arrays = dict(zip(inputs, ins, strict=True))
        env = block.hidden([arrays[value] for value in block.inputs])
        hidden, norms = block.activations(env, spec)

        def down(h: Any) -> Any:
            return to_tokens(block.down(env, h), match.down.out_axes)

        active = activity(hidden, norms, spec, down, shares=shares)
        moments = Moments.of(to_tokens(arrays[match.x], match.x_axes))
        return [block.down(env, hidden)], (moments, active)

    return SiteReplacement(
        site.name,
        match.nodes,
        inputs,
        match.outputs,
        run,
        None,
        site.sharding.region,
        site.loops,
        reports=True,
    )


class _Block:
    """A block's nodes, run in two halves: up to its hidden activations, and from there on."""

    def __init__(self, match: FFNMatch) -> None:
        self.match = match
        nodes = sorted(match.nodes, key=lambda node: node.index)
        made = {value for node in nodes for value in node.outs}
        reads = [value for node in nodes for value in node.ins if value not in made]
        self.inputs = tuple(
            dict.fromkeys(v for v in reads if v.literal is None and v.const is None)
        )
        front = [node for node in nodes if node not in match.tail]
        self._front = _steps(front, {*self.inputs, *made})

    def hidden(self, ins: Sequence[Any]) -> dict[Value, Any]:
        """All values up to the hidden activations, of the arrays for `inputs`."""
        env = dict(zip(self.inputs, ins, strict=True))
        for step in self._front:
            run_node(step, env)
        return env

    def down(self, env: Mapping[Value, Any], hidden: Any) -> Any:
        """The block's result for other activations, [tokens, f]."""
        region = self.match.region
        rows = from_tokens(hidden, region.value.shape, (region.axis,))
        env = {**env, region.value: rows}
        for node in self.match.tail:
            run_node(node, env)
        return env[self.match.down.out]

    def activations(self, env: Mapping[Value, Any], spec: FFNSpec) -> tuple[Any, Any]:
        """h: [tokens, f], and the norms of the second rows if they rank it, f32[f]."""
        region = self.match.region
        hidden = to_tokens(env[region.value], (region.axis,))
        return hidden, self._norms(env) if spec.criterion == "output" else None

    def _norms(self, env: Mapping[Value, Any]) -> Any:
        """f32[f]: the norms of the rows of the last matrix."""
        linear, piece = self.match.down, self.match.piece
        weight = look_up(linear.weight, env).astype(jnp.float32)
        rows = jnp.moveaxis(weight, linear.weight_in, range(len(linear.weight_in)))
        norms = jnp.sqrt(jnp.square(rows.reshape(linear.in_dim, -1)).sum(-1))
        return lax.slice_in_dim(norms, piece.start, piece.start + self.match.region.size)


def _steps(nodes: Sequence[Node], known: set[Value]) -> list[Node | Frame]:
    """Nodes in order, those of a call with a derivative of its own as that call."""
    inside, steps = set(nodes), dict[Node | Frame, None]()
    for node in nodes:
        step: Node | Frame = node
        for frame in node.frame.around():
            call = None if frame.eqn is None else inline_call(frame.eqn)
            reads = (v for v in frame.ins if v.literal is None and v.const is None)
            whole = inside.issuperset(frame.nodes()) and known.issuperset(reads)
            if whole and call is not None and call.derivative:
                step = frame
        steps[step] = None
    return list(steps)
