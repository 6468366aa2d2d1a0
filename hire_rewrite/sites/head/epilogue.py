"""The function's own code behind the logits of a head, as the operations call it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hire_rewrite.graph.nodes import Value
from hire_rewrite.graph.view import run_node
from hire_rewrite.ops.head.head import Endpoints
from hire_rewrite.sites.head.match import HeadMatch
from hire_rewrite.sites.layout import from_rows, to_rows

__all__ = ["endpoint_values", "endpoints_of"]


def endpoints_of(match: HeadMatch, sides: Mapping[Value, Any]) -> Endpoints:
    """The function's own code behind the logits, from [tokens, V] to [tokens, V]."""

    def run(raw: Any) -> tuple[Any, ...]:
        linear = match.linear
        env = {**sides, linear.out: from_rows(raw, linear.out.shape, (match.axis,))}
        for node in match.chain:
            run_node(node, env)
        return tuple(to_rows(env[v], match.places[v][:1]) for v in match.endpoints)

    return run


def endpoint_values(match: HeadMatch, results: Sequence[Any]) -> list[Any]:
    return [
        from_rows(rows, value.shape, match.places[value][:1])
        for value, rows in zip(match.endpoints, results, strict=True)
    ]
