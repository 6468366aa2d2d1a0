"""`lax.cond`, `lax.switch` and `lax.platform_dependent`: one of several branches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from hire_rewrite.graph.calls.table import BodyResult, BodySpec, BodyWriter
from hire_rewrite.graph.nodes import Body, Input, Node, Output


class Cond:
    """A branch that was not taken reports zeros."""

    controls = 1

    def bodies(self, eqn: Any, ins: Sequence[Any]) -> list[BodySpec]:
        inputs = tuple(Input(value, "const") for value in ins[1:])
        outputs = tuple(Output(i) for i in range(len(eqn.outvars)))
        return [BodySpec(branch, 1, inputs, outputs) for branch in eqn.params["branches"]]

    def write(self, node: Node, writer: BodyWriter) -> BodyResult:
        live = [i for i, value in enumerate(node.outs) if writer.is_live(value)]

        def branch(body: Body, zeros: dict[str, Any]) -> Any:
            def run() -> tuple[list[Any], dict[str, Any]]:
                inputs = {
                    i: writer.read(link.outer)
                    for i, link in enumerate(body.inputs)
                    if writer.is_live(body.scope.inputs[i])
                }
                result = writer.run(body, inputs)
                return [result.outputs[i] for i in live], zeros | result.reports

            return run

        zeros: dict[str, Any] = {}
        for body in node.bodies:
            zeros |= writer.report_zeros(branch(body, {}))
        runs = [branch(body, zeros) for body in node.bodies]
        platforms = node.params.get("branches_platforms")
        if platforms is None:
            outputs, reports = jax.lax.switch(writer.read(node.ins[0]), runs)
        else:
            pairs = zip(platforms, runs, strict=True)
            named = {name: run for names, run in pairs for name in names or ()}
            default = runs[-1] if platforms[-1] is None else None
            outputs, reports = jax.lax.platform_dependent(default=default, **named)
        return BodyResult(dict(zip(live, outputs, strict=True)), reports)
