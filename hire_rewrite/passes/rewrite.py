"""Emit a function again with some of its nodes replaced: interpret the view and retrace.

Nothing is assembled by hand. What did not change goes through `jax.core.eval_jaxpr`, calls,
loops and branches that hold a change go through their public combinator, and a replacement is an
ordinary function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hire_rewrite import _compat
from hire_rewrite.graph.calls import BodyResult, inline_calls, structured_calls
from hire_rewrite.graph.liveness import Liveness, liveness
from hire_rewrite.graph.nodes import Body, Node, Scope, Value
from hire_rewrite.graph.trace import Trace
from hire_rewrite.graph.view import evaluate, look_up
from hire_rewrite.passes.emit.schedule import Call, Item, Keep, Loop, Replacement, schedule

__all__ = ["Rewritten", "rewrite"]


@dataclasses.dataclass(frozen=True, eq=False)
class Rewritten:
    """A function with replacements; `needs` are the numbers of the inputs that it still reads."""

    scope: Scope
    units: Mapping[Node, Replacement]
    live: Liveness
    needs: frozenset[int]

    def __call__(self, inputs: Mapping[int, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Results and the reports of the replacements, by site.

        Args:
          inputs: arrays by number; those of `needs` at least.
        """
        writer = _Writer(self.units, self.live)
        env = {self.scope.inputs[i]: inputs[i] for i in self.needs}
        return writer.run_scope(self.scope, env, _Around())


def rewrite(trace: Trace, replacements: Sequence[Replacement]) -> Rewritten:
    """The traced function with `replacements` in place of their nodes."""
    units = {node: unit for unit in replacements for node in unit.nodes}
    live = liveness(trace.scope, units)
    needs = frozenset(i for i, value in enumerate(trace.scope.inputs) if value in live.values)
    return Rewritten(trace.scope, units, live, needs)


@dataclasses.dataclass(frozen=True)
class _Around:
    """What the loops around a piece of code hand to the replacements in it.

    `index` has the iteration of each scan, `states` the arrays of replacements in a `shard_map`.
    """

    index: dict[Scope, Any] = dataclasses.field(default_factory=dict)
    states: dict[Replacement, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class _Writer:
    units: Mapping[Node, Replacement]
    live: Liveness
    schedules: dict[Scope, tuple[Item, ...]] = dataclasses.field(default_factory=dict)

    def run_scope(
        self, scope: Scope, env: dict[Value, Any], around: _Around
    ) -> tuple[list[Any], dict[str, Any]]:
        """Results of a scope (None for those that nobody needs) and the reports in it."""
        if scope not in self.schedules:
            self.schedules[scope] = schedule(scope, self.units, self.live)
        reports = self.run_items(self.schedules[scope], env, around)
        results = [look_up(v, env) if v in self.live.results else None for v in scope.outputs]
        return results, reports

    def run_items(
        self, items: Sequence[Item], env: dict[Value, Any], around: _Around
    ) -> dict[str, Any]:
        reports: dict[str, Any] = {}
        for item in items:
            if isinstance(item, Keep):
                ins = [look_up(value, env) for value in item.reads]
                results = evaluate(item.entry, ins)
            elif isinstance(item, Loop):
                call = structured_calls[item.node.primitive]
                result = call.write(item.node, _LoopWriter(self, item.node, env, around))
                reports |= result.reports
                results = [result.outputs.get(i) for i in range(len(item.writes))]
            elif isinstance(item, Call):
                results, inner = self._run_call(item, env, around)
                reports |= inner
            else:
                ins = [look_up(value, env) for value in item.reads]
                unit = item.replacement
                state = around.states.get(unit, unit.state)
                results, report = unit.emit(ins, around.index, state)
                if report is not None:
                    # One type for all: loops and branches put zeros in their place.
                    reports[unit.name] = jax.tree.map(_compat.varying, report)
            env.update((v, r) for v, r in zip(item.writes, results, strict=True) if r is not None)
        return reports

    def _run_call(
        self, item: Call, env: Mapping[Value, Any], around: _Around
    ) -> tuple[list[Any], dict[str, Any]]:
        def body(*arrays: Any) -> tuple[list[Any], dict[str, Any]]:
            inner = dict(zip(item.reads, arrays, strict=True))
            reports = self.run_items(item.items, inner, around)
            return [inner[value] for value in item.writes], reports

        eqn = item.frame.eqn
        wrapped = inline_calls[eqn.primitive].wrap(eqn, body)
        assert wrapped is not None
        return wrapped(*(look_up(value, env) for value in item.reads))


@dataclasses.dataclass
class _LoopWriter:
    """What `calls.StructuredCall.write` works with."""

    writer: _Writer
    node: Node
    env: Mapping[Value, Any]
    around: _Around

    def read(self, value: Value) -> Any:
        return look_up(value, self.env)

    def is_live(self, value: Value) -> bool:
        return value in self.writer.live.values

    def run(
        self,
        body: Body,
        inputs: dict[int, Any],
        index: Any | None,
        states: dict[Any, Any] | None = None,
    ) -> BodyResult:
        env = {body.scope.inputs[i]: array for i, array in inputs.items()}
        counts = {} if index is None else {body.scope: index}
        around = _Around(self.around.index | counts, self.around.states | (states or {}))
        outputs, reports = self.writer.run_scope(body.scope, env, around)
        return BodyResult({j: o for j, o in enumerate(outputs) if o is not None}, reports)

    def split_reports(
        self, body: Body, reports: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        loops = {unit.name: unit.loops for unit in self.writer.units.values()}
        apart = {name: r for name, r in reports.items() if body.scope in loops[name]}
        return apart, {name: r for name, r in reports.items() if name not in apart}

    def units(self, body: Body) -> list[Replacement]:
        inside = set(body.scope.walk())
        found = (u for node, u in self.writer.units.items() if node.scope in inside)
        return list(dict.fromkeys(found))

    def report_zeros(self, run: Callable[..., Any], *args: Any) -> dict[str, Any]:
        if not any(unit.reports for body in self.node.bodies for unit in self.units(body)):
            return {}
        reports = jax.eval_shape(run, *args)[1]
        return jax.tree.map(
            lambda leaf: _compat.varying(jnp.zeros(leaf.shape, leaf.dtype)), reports
        )
