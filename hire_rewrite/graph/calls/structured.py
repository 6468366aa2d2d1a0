"""Calls with scopes of their own: `scan`, `while_loop`, `cond` and `shard_map`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import primitives as p
from jax.sharding import PartitionSpec

from hire_rewrite import _compat
from hire_rewrite.graph.calls.table import BodyResult, BodySpec, BodyWriter, StructuredCall
from hire_rewrite.graph.nodes import Body, Input, Node, Output
from hire_rewrite.graph.reports import combine


class Scan:
    """`lax.scan`: constants, carries and slices in; carries and stacked outputs out.

    Dead carries and slices are dropped; an iteration count is added for the sites inside.
    """

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


class While:
    """`lax.while_loop`: a condition and a body that share the carried values.

    Reports of the sites inside are summed in the carry, for there is no count of iterations.
    """

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


class Cond:
    """`lax.cond`, `switch`, `platform_dependent`: a branch that is not taken reports zeros."""

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


class ShardMap:
    """`jax.shard_map`: a body that runs on each device, on one shard of each operand.

    The arrays of replacements inside become operands. What the devices report comes out with all
    of them on a leading axis, and is put together outside.
    """

    controls = 0

    def bodies(self, eqn: Any, ins: Sequence[Any]) -> list[BodySpec]:
        specs = eqn.params["in_specs"]
        inputs = tuple(Input(v, "shard", spec) for v, spec in zip(ins, specs, strict=True))
        outputs = tuple(Output(i) for i in range(len(eqn.outvars)))
        return [BodySpec(eqn.params["jaxpr"], 1, inputs, outputs)]

    def write(self, node: Node, writer: BodyWriter) -> BodyResult:
        (body,) = node.bodies
        params = node.params
        live_in = [i for i, value in enumerate(body.scope.inputs) if writer.is_live(value)]
        live_out = [i for i, value in enumerate(node.outs) if writer.is_live(value)]
        in_specs = [params["in_specs"][i] for i in live_in]
        units = [unit for unit in writer.units(body) if unit.shards is not None]
        states = [unit.state for unit in units]
        manual = tuple(a for a in params["mesh"].axis_names if a in params["newly_manual_axes"])

        def run(states: list[Any], shards: list[Any]) -> tuple[list[Any], dict[str, Any]]:
            inputs = dict(zip(live_in, shards, strict=True))
            result = writer.run(body, inputs, None, dict(zip(units, states, strict=True)))
            return [result.outputs[i] for i in live_out], jax.tree.map(
                lambda leaf: leaf[None], result.reports
            )

        mapped = jax.shard_map(
            run,
            mesh=params["mesh"],
            in_specs=([unit.shards.spec for unit in units], in_specs),
            out_specs=([params["out_specs"][i] for i in live_out], PartitionSpec(manual)),
            axis_names=set(params["newly_manual_axes"]),
            check_vma=params["check_vma"],
        )
        operands = [writer.read(body.inputs[i].outer) for i in live_in]
        results, reports = mapped(states, operands)
        known = {name: unit.shards for unit in units for name in unit.reported}
        together = {name: known[name].combine(report) for name, report in reports.items()}
        return BodyResult(dict(zip(live_out, results, strict=True)), together)


structured_calls: dict[Any, StructuredCall] = {
    p.scan_p: Scan(),
    p.while_p: While(),
    p.cond_p: Cond(),
    _compat.shard_map_p: ShardMap(),
}
