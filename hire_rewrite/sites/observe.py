"""A site as it is, which tells calibration what it sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hire_rewrite.graph.evaluate import run_node
from hire_rewrite.graph.nodes import Scope
from hire_rewrite.ops.moments import Moments
from hire_rewrite.patterns.linear import Linear
from hire_rewrite.sharding.rows import Sharding
from hire_rewrite.sites.layout import to_tokens
from hire_rewrite.sites.replacement import SiteReplacement


def tap(name: str, linear: Linear, sharding: Sharding, loops: tuple[Scope, ...]) -> SiteReplacement:
    """A linear layer as it is, which reports the moments of its input (and None besides)."""
    node = linear.node
    inputs = tuple(dict.fromkeys(v for v in node.ins if v.literal is None and v.const is None))

    def run(ins: Sequence[Any], *_: Any) -> tuple[list[Any], Any]:
        env = dict(zip(inputs, ins, strict=True))
        run_node(node, env)
        moments = Moments.of(to_tokens(env[linear.x], linear.x_axes))
        return [env[value] for value in node.outs], (moments, None)

    return SiteReplacement(
        name, frozenset({node}), inputs, node.outs, run, None, sharding.region, loops, reports=True
    )
