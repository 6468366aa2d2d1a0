"""`jax.shard_map`: a body that runs on each device's shards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from hire_rewrite.graph.calls.table import BodyResult, BodySpec, BodyWriter
from hire_rewrite.graph.nodes import Input, Node, Output


class ShardMap:
    """Each operand is seen as one shard of it.

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
        known = {unit.name: unit.shards for unit in units}
        together = {name: known[name].combine(report) for name, report in reports.items()}
        return BodyResult(dict(zip(live_out, results, strict=True)), together)
