"""`lax.scan`: constants, carries and slices in; carries and stacked outputs out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hire_rewrite import _compat
from hire_rewrite.graph.calls.table import BodyResult, BodySpec, BodyWriter
from hire_rewrite.graph.nodes import Input, Node, Output
from hire_rewrite.graph.reports import combine


class Scan:
    """Dead carries and slices are dropped; an iteration count is added for the sites inside."""

    controls = 0

    def bodies(self, eqn: Any, ins: Sequence[Any]) -> list[BodySpec]:
        consts, carries = _compat.scan_split(eqn.params)
        roles = ["const"] * consts + ["carry"] * carries
        roles += ["slice"] * (len(ins) - len(roles))
        outputs = tuple(
            Output(i, ((0, consts + i),) if i < carries else ()) for i in range(len(eqn.outvars))
        )
        inputs = tuple(Input(value, role) for value, role in zip(ins, roles, strict=True))
        return [BodySpec(eqn.params["jaxpr"], eqn.params["length"], inputs, outputs)]

    def write(self, node: Node, writer: BodyWriter) -> BodyResult:
        (body,) = node.bodies
        live = [i for i, value in enumerate(body.scope.inputs) if writer.is_live(value)]
        operands = {i: writer.read(body.inputs[i].outer) for i in live}
        carried = [i for i in live if body.inputs[i].role == "carry"]
        sliced = [i for i in live if body.inputs[i].role == "slice"]
        feeder = {i: j for j, output in enumerate(body.outputs) for _, i in output.feeds}
        stacked = [
            j
            for j, output in enumerate(body.outputs)
            if not output.feeds and writer.is_live(node.outs[j])
        ]

        def iterate(carry: Sequence[Any], slices: tuple[Any, list[Any]]) -> BodyResult:
            index, xs = slices
            inputs = operands | dict(zip(carried, carry, strict=True))
            return writer.run(body, inputs | dict(zip(sliced, xs, strict=True)), index)

        def step(
            state: tuple[Sequence[Any], Any], slices: tuple[Any, list[Any]]
        ) -> tuple[Any, Any]:
            carry, totals = state
            result = iterate(carry, slices)
            apart, summed = writer.split_reports(body, result.reports)
            new = [result.outputs[feeder[i]] for i in carried]
            totals = combine(totals, summed)
            return (new, totals), ([result.outputs[j] for j in stacked], apart)

        def first() -> tuple[None, dict[str, Any]]:
            reports = iterate(init, jax.tree.map(lambda array: array[0], xs)).reports
            return None, writer.split_reports(body, reports)[1]

        length = node.params["length"]
        init = [operands[i] for i in carried]
        xs = (jnp.arange(length, dtype=jnp.int32), [operands[i] for i in sliced])
        (carry, totals), (ys, apart) = jax.lax.scan(
            step,
            (init, writer.report_zeros(first)),
            xs,
            length=length,
            reverse=node.params["reverse"],
            unroll=node.params["unroll"],
        )
        outputs = {feeder[i]: value for i, value in zip(carried, carry, strict=True)}
        return BodyResult(outputs | dict(zip(stacked, ys, strict=True)), apart | totals)
