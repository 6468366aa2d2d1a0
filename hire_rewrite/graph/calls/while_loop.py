"""`lax.while_loop`: a condition and a body that share the carried values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from hire_rewrite.graph.calls.table import BodyResult, BodySpec, BodyWriter
from hire_rewrite.graph.nodes import Input, Node, Output
from hire_rewrite.graph.reports import combine


class While:
    """Reports of the sites inside are summed in the carry, for there is no count of iterations."""

    controls = 0

    def bodies(self, eqn: Any, ins: Sequence[Any]) -> list[BodySpec]:
        nc, nb = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        cond_consts, body_consts, carry = ins[:nc], ins[nc : nc + nb], ins[nc + nb :]

        def inputs(consts: Sequence[Any]) -> tuple[Input, ...]:
            return (*(Input(v, "const") for v in consts), *(Input(v, "carry") for v in carry))

        outputs = tuple(Output(i, ((0, nc + i), (1, nb + i))) for i in range(len(carry)))
        return [
            BodySpec(eqn.params["cond_jaxpr"], None, inputs(cond_consts), (Output(None),)),
            BodySpec(eqn.params["body_jaxpr"], None, inputs(body_consts), outputs),
        ]

    def write(self, node: Node, writer: BodyWriter) -> BodyResult:
        cond, body = node.bodies
        nc, nb = node.params["cond_nconsts"], node.params["body_nconsts"]
        slots = range(len(body.outputs))
        live = [
            i
            for i in slots
            if writer.is_live(cond.scope.inputs[nc + i])
            or writer.is_live(body.scope.inputs[nb + i])
            or writer.is_live(node.outs[i])
        ]

        def consts(part: Any) -> dict[int, Any]:
            return {
                i: writer.read(link.outer)
                for i, link in enumerate(part.inputs)
                if link.role == "const" and writer.is_live(part.scope.inputs[i])
            }

        cond_consts, body_consts = consts(cond), consts(body)

        def proceed(state: tuple[list[Any], Any]) -> Any:
            carry = {nc + i: value for i, value in zip(live, state[0], strict=True)}
            return writer.run(cond, cond_consts | carry).outputs[0]

        def step(carry: list[Any]) -> tuple[list[Any], Any]:
            inputs = {nb + i: value for i, value in zip(live, carry, strict=True)}
            result = writer.run(body, body_consts | inputs)
            return [result.outputs[i] for i in live], result.reports

        def repeat(state: tuple[list[Any], Any]) -> tuple[list[Any], Any]:
            carry, reports = step(state[0])
            return carry, combine(state[1], reports)

        init = [writer.read(body.inputs[nb + i].outer) for i in live]
        start = (init, writer.report_zeros(step, init))
        carry, reports = jax.lax.while_loop(proceed, repeat, start)
        return BodyResult(dict(zip(live, carry, strict=True)), reports)
