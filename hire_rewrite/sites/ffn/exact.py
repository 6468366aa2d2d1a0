"""A block on its weights as they are, by the model's own code: its top k, and what it looks at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from hire_rewrite.graph.calls import inline_call
from hire_rewrite.graph.evaluate import look_up, run_node
from hire_rewrite.graph.nodes import Frame, Node, Value
from hire_rewrite.ops.ffn.activity import activity
from hire_rewrite.ops.ffn.block import FFNSpec
from hire_rewrite.ops.ffn.importance import top_groups
from hire_rewrite.ops.moments import Moments
from hire_rewrite.ops.quality import lengths
from hire_rewrite.patterns.region import from_tokens, to_tokens
from hire_rewrite.sites.ffn.match import FFNMatch
from hire_rewrite.sites.replacement import arguments

_BINS = 64


class Positives(NamedTuple):
    """Sums over tokens.

    Attributes:
      tokens: f32[], how many.
      share: f32[], of neurons that are not zero.
      bins: f32[n], how many tokens have a share in each of n equal parts of 0 to 1.
    """

    tokens: Array
    share: Array
    bins: Array


class RawBlock:
    """A block on its weights as they are, run in two halves: to its hidden activations, and on."""

    def __init__(self, match: FFNMatch, spec: FFNSpec | None = None) -> None:
        self.match, self._spec = match, spec
        nodes = sorted(match.nodes, key=lambda node: node.index)
        made = {value for node in nodes for value in node.outs}
        reads = (value for node in nodes for value in node.ins if value not in made)
        self.inputs = arguments((*reads, match.x))
        front = [node for node in nodes if node not in match.tail]
        self._front = _steps(front, {*self.inputs, *made})

    @property
    def spec(self) -> FFNSpec:
        """What is chosen, where a top k is."""
        assert self._spec is not None
        return self._spec

    def exact_ffn(self, ins: Sequence[Any]) -> list[Any]:
        """The outputs of the exact top k in dense arithmetic, of the arrays for `inputs`."""
        env, hidden, norms = self._hidden(ins)
        return [self._down(env, top_groups(hidden, norms, self.spec))]

    def observed(self, ins: Sequence[Any], *, shares: bool) -> tuple[list[Any], Any]:
        """The block's own outputs; the moments of its input and its `Activity`."""
        match, (env, hidden, norms) = self.match, self._hidden(ins)

        def down(h: Any) -> Any:
            return to_tokens(self._down(env, h), match.down.out_axes)

        active = activity(hidden, norms, self.spec, down, shares=shares)
        moments = Moments.of(to_tokens(env[match.x], match.x_axes))
        return [self._down(env, hidden)], (moments, active)

    def positive(self, ins: Sequence[Any]) -> tuple[list[Any], Any]:
        """The block's own outputs; the moments of its input and how many neurons are not zero."""
        env, hidden, _ = self._hidden(ins)
        share = (hidden != 0).mean(1, dtype=jnp.float32)
        place = jnp.clip((share * _BINS).astype(jnp.int32), 0, _BINS - 1)
        bins = jnp.zeros(_BINS, jnp.float32).at[place].add(1.0)
        seen = Positives(jnp.float32(share.shape[0]), share.sum(), bins)
        moments = Moments.of(to_tokens(env[self.match.x], self.match.x_axes))
        return [self._down(env, hidden)], (moments, seen)

    def _hidden(self, ins: Sequence[Any]) -> tuple[dict[Value, Any], Any, Any]:
        """All values up to the hidden activations; those, [tokens, f]; and f32[f], the norms of the
        second rows if they rank them."""
        env = dict(zip(self.inputs, ins, strict=True))
        for step in self._front:
            run_node(step, env)
        region = self.match.region
        hidden = to_tokens(env[region.value], (region.axis,))
        by_output = self._spec is not None and self._spec.criterion == "output"
        return env, hidden, self._norms(env) if by_output else None

    def _down(self, env: Mapping[Value, Any], hidden: Any) -> Any:
        """The block's result for other activations, [tokens, f]."""
        region = self.match.region
        rows = from_tokens(hidden, region.value.shape, (region.axis,))
        env = {**env, region.value: rows}
        for node in self.match.tail:
            run_node(node, env)
        return env[self.match.down.out]

    def _norms(self, env: Mapping[Value, Any]) -> Any:
        """f32[f]: the norms of the rows of the last matrix."""
        linear, piece = self.match.down, self.match.piece
        weight = look_up(linear.weight, env).astype(jnp.float32)
        rows = jnp.moveaxis(weight, linear.weight_in, range(len(linear.weight_in)))
        norms = lengths(rows.reshape(linear.in_dim, -1))
        return lax.slice_in_dim(norms, piece.start, piece.start + self.match.region.size)


def _steps(nodes: Sequence[Node], known: set[Value]) -> list[Node | Frame]:
    """Nodes in order, those of a call with a derivative of its own as that call."""
    inside, steps = set(nodes), dict[Node | Frame, None]()
    for node in nodes:
        step: Node | Frame = node
        for frame in node.frame.around():
            call = None if frame.eqn is None else inline_call(frame.eqn)
            whole = inside.issuperset(frame.nodes()) and known.issuperset(arguments(frame.ins))
            if whole and call is not None and call.derivative:
                step = frame
        steps[step] = None
    return list(steps)
