"""The function's own code behind the logits of a head, as the operations call it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hire_rewrite.graph.evaluate import run_node
from hire_rewrite.graph.nodes import Value
from hire_rewrite.ops.head.spec import Endpoints
from hire_rewrite.sites.head.match import HeadMatch
from hire_rewrite.sites.layout import from_tokens, to_tokens


def epilogue_of(match: HeadMatch, side_inputs: Mapping[Value, Any]) -> Endpoints:
    """The function's own code behind the logits: [tokens, V] to [tokens, V] for each output."""

    def run(raw: Any) -> tuple[Any, ...]:
        logits = match.logits
        env = {**side_inputs, logits: from_tokens(raw, logits.shape, (match.axis,))}
        for node in match.epilogue:
            run_node(node, env)
        return tuple(to_tokens(env[v], match.places[v][:1]) for v in match.outputs)

    return run


def output_values(match: HeadMatch, results: Sequence[Any]) -> list[Any]:
    """The outputs [tokens, V] as the function lays them out."""
    return [
        from_tokens(rows, value.shape, match.places[value][:1])
        for value, rows in zip(match.outputs, results, strict=True)
    ]
