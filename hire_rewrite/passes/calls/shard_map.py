"""`jax.shard_map`: a body that runs on each device's shards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from hire_rewrite.passes.calls.table import BodyResult, BodySpec, BodyWriter
from hire_rewrite.patterns.graph import Input, Node, Output


class ShardMap:
    """Each operand is seen as one shard of it."""

    controls = 0

    def bodies(self, eqn: Any, ins: Sequence[Any]) -> list[BodySpec]:
        inputs = tuple(Input(value, "shard") for value in ins)
        outputs = tuple(Output(i) for i in range(len(eqn.outvars)))
        return [BodySpec(eqn.params["jaxpr"], 1, inputs, outputs)]

    def write(self, node: Node, writer: BodyWriter) -> BodyResult:
        (body,) = node.bodies
        params = node.params
        live_in = [i for i, value in enumerate(body.scope.inputs) if writer.is_live(value)]
        live_out = [i for i, value in enumerate(node.outs) if writer.is_live(value)]

        def run(*shards: Any) -> list[Any]:
            result = writer.run(body, dict(zip(live_in, shards, strict=True)), None)
            return [result.outputs[i] for i in live_out]

        mapped = jax.shard_map(
            run,
            mesh=params["mesh"],
            in_specs=tuple(params["in_specs"][i] for i in live_in),
            out_specs=[params["out_specs"][i] for i in live_out],
            axis_names=set(params["newly_manual_axes"]),
            check_vma=params["check_vma"],
        )
        results = mapped(*(writer.read(body.inputs[i].outer) for i in live_in))
        return BodyResult(dict(zip(live_out, results, strict=True)), {})
