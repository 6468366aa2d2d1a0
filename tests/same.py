"""Equations replaced by themselves: all around them is written again, and nothing changes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from hire_rewrite.graph.evaluate import evaluate
from hire_rewrite.graph.nodes import Node, Scope, Value
from hire_rewrite.graph.trace import trace
from hire_rewrite.passes.rewrite import rewrite
from tests.cases import run


@dataclasses.dataclass(eq=False)
class Same:
    """Replaces one node, or several in a row, by themselves; reports the sum of their results."""

    name: str
    parts: tuple[Node, ...]
    loops: tuple[Scope, ...] = ()
    reports: bool = False
    state: None = None
    joint: None = None
    shards: None = None
    known: dict = dataclasses.field(default_factory=dict)

    @property
    def reported(self):
        return (self.name, *self.known)

    @property
    def nodes(self):
        return frozenset(self.parts)

    @property
    def outputs(self) -> tuple[Value, ...]:
        return tuple(value for node in self.parts for value in node.outs)

    @property
    def inputs(self) -> tuple[Value, ...]:
        read = (value for node in self.parts for value in node.ins)
        fixed = [v for v in read if v.literal is None and v.const is None]
        return tuple(dict.fromkeys(v for v in fixed if v not in self.outputs))

    def emit(self, ins, index, state):
        env = dict(zip(self.inputs, ins, strict=True))
        for node in self.parts:
            operands = [env.get(v, v.const if v.literal is None else None) for v in node.ins]
            env.update(zip(node.outs, evaluate(node, operands), strict=True))
        results = [env[value] for value in self.outputs]
        total = sum(jnp.sum(r.astype(jnp.float32)) for r in results) if self.reports else None
        return results, total


def nodes_of(traced, *names):
    nodes = [node for scope in traced.scope.walk() for node in scope.nodes]
    return [node for node in nodes if node in traced.live.nodes and str(node.primitive) in names]


def replaced(fn, *args, names=("sin",), **kwargs):
    """Results of `fn` with every equation of `names` replaced by itself; how many there were."""
    traced = trace(fn, args, {}, ())
    nodes = nodes_of(traced, *names)
    swaps = [Same(f"{i}", (node,), **kwargs) for i, node in enumerate(nodes)]
    rewritten = rewrite(traced, swaps)
    leaves = jax.tree.leaves(args)
    results, reports = run(
        lambda leaves: rewritten({i: leaves[i] for i in rewritten.needs}), leaves
    )
    return jax.tree.unflatten(traced.out_tree, results), reports, rewritten, nodes


def same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert jnp.asarray(a).dtype == jnp.asarray(b).dtype
        np.testing.assert_array_equal(a, b)


def chain(x):
    return jnp.sin(x) * 0.5 + x
