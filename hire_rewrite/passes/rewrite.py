"""Emit a function again with some of its nodes replaced: interpret it and retrace.

What did not change is evaluated as it was, calls, loops and branches that hold a change go through
their public combinator, and a replacement is an ordinary function. Each runs under the named scopes
and the annotations of what stood in its place.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import source_info_util
from jax.extend.core import primitives as p
from jax.extend.source_info_util import NameStack

from hire_rewrite import _compat
from hire_rewrite.errors import HireRewriteError
from hire_rewrite.graph.calls import BodyResult, inline_call, structured_calls
from hire_rewrite.graph.evaluate import evaluate, look_up, traced_context
from hire_rewrite.graph.liveness import Liveness, liveness
from hire_rewrite.graph.nodes import Body, Frame, Node, Scope, Value
from hire_rewrite.graph.trace import Trace
from hire_rewrite.passes.join import joined
from hire_rewrite.passes.schedule import Call, Item, Keep, Loop, Swap, schedule
from hire_rewrite.sites.replacement import SiteReplacement


@dataclasses.dataclass(frozen=True, eq=False)
class Rewritten:
    """A function with replacements; `needs` are the numbers of the inputs that it still reads."""

    scope: Scope
    units: Mapping[Node, SiteReplacement]
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


def rewrite(trace: Trace, replacements: Sequence[SiteReplacement]) -> Rewritten:
    """The traced function with `replacements` in place of their nodes."""
    units = {node: unit for unit in joined(replacements) for node in unit.nodes}
    live = liveness(trace.scope, units)
    needs = frozenset(i for i, value in enumerate(trace.scope.inputs) if value in live.values)
    return Rewritten(trace.scope, units, live, needs)


def rewrite_for(
    trace: Trace, replacements: Sequence[SiteReplacement], inputs: Mapping[int, Any], name: str
) -> Rewritten:
    """`rewrite` for a call with such inputs.

    Args:
      name: of the function.

    Raises:
      HireRewriteError: it reads weights that are not among the inputs.
    """
    rewritten = rewrite(trace, replacements)
    missing = [trace.paths[i] for i in sorted(rewritten.needs - inputs.keys())]
    if missing:
        raise HireRewriteError(
            f"{name}: the Packed lacks {', '.join(missing)}, which this call reads outside the "
            "packed sites: pack for a call like this one"
        )
    return rewritten


@dataclasses.dataclass(frozen=True)
class _Around:
    """What the loops around a piece of code hand to the replacements in it.

    `index` has the iteration of each scan, `states` the arrays of replacements in a `shard_map`.
    """

    index: dict[Scope, Any] = dataclasses.field(default_factory=dict)
    states: dict[SiteReplacement, Any] = dataclasses.field(default_factory=dict)


def _precision_of(nodes: Collection[Node]) -> AbstractContextManager[Any]:
    """The precision that the products among some nodes ask for, for those that take their place and
    ask for none."""
    asked = {node.params["precision"] for node in nodes if node.primitive is p.dot_general_p}
    for precision in (lax.Precision.HIGHEST, lax.Precision.HIGH):
        if (precision, precision) in asked:
            return jax.default_matmul_precision(precision.name.lower())
    return contextlib.nullcontext()


@dataclasses.dataclass
class _Writer:
    units: Mapping[Node, SiteReplacement]
    live: Liveness
    schedules: dict[Scope, tuple[Item, ...]] = dataclasses.field(default_factory=dict)

    def run_scope(
        self, scope: Scope, env: dict[Value, Any], around: _Around
    ) -> tuple[list[Any], dict[str, Any]]:
        """Results of a scope (None for those that nobody needs) and the reports in it."""
        if scope not in self.schedules:
            self.schedules[scope] = schedule(scope, self.units, self.live)
        reports = self.run_items(self.schedules[scope], scope.root, env, around)
        results = [look_up(v, env) if v in self.live.results else None for v in scope.outputs]
        return results, reports

    def run_items(
        self, items: Sequence[Item], home: Frame, env: dict[Value, Any], around: _Around
    ) -> dict[str, Any]:
        """Run the items of a frame; adds what they write to `env` and returns their reports."""
        reports: dict[str, Any] = {}
        for item in items:
            with _names_of(item, home):
                results, more = self._run(item, env, around)
            reports |= more
            env.update((v, r) for v, r in zip(item.writes, results, strict=True) if r is not None)
        return reports

    def _run(
        self, item: Item, env: Mapping[Value, Any], around: _Around
    ) -> tuple[Sequence[Any], dict[str, Any]]:
        if isinstance(item, Loop):
            node = item.entry
            with traced_context(node.eqn):
                writer = _LoopWriter(self, node, env, around)
                result = structured_calls[node.primitive].write(node, writer)
            return [result.outputs.get(i) for i in range(len(item.writes))], result.reports
        ins = [look_up(value, env) for value in item.reads]
        if isinstance(item, Keep):
            return evaluate(item.entry, ins), {}
        if isinstance(item, Call):
            return self._run_call(item, ins, around)
        unit = item.replacement
        last = max(unit.nodes, key=lambda node: node.index)  # all are annotated alike
        with traced_context(last.eqn, inside=True), _precision_of(unit.nodes):
            results, report = unit.emit(ins, around.index, around.states.get(unit, unit.state))
        reports = {**unit.known} if report is None else {**unit.known, unit.name: report}
        # One type for all reports: loops and branches put zeros in their place.
        return results, jax.tree.map(_compat.varying, reports)

    def _run_call(
        self, item: Call, ins: Sequence[Any], around: _Around
    ) -> tuple[list[Any], dict[str, Any]]:
        frame = item.entry

        def body(*arrays: Any) -> tuple[list[Any], dict[str, Any]]:
            inner = dict(zip(item.reads, arrays, strict=True))
            reports = self.run_items(item.items, frame, inner, around)
            return [inner[value] for value in item.writes], reports

        call = inline_call(frame.eqn)
        assert call is not None
        operands = [frame.ins.index(value) for value in item.reads]
        with traced_context(frame.eqn):
            results: tuple[list[Any], dict[str, Any]]
            results = call.wrap(frame.eqn, body, operands)(*ins)
        return results


def _names_of(item: Item, home: Frame) -> AbstractContextManager[Any]:
    """The named scopes between a frame and what an item stands for."""
    if isinstance(item, Swap):
        names = _common_names(item.nodes, home)
    else:
        names = _names_around(item.entry, home)
    return source_info_util.set_name_stack(source_info_util.current_name_stack() + names)


def _names_around(entry: Node | Frame, home: Frame) -> NameStack:
    """The calls between a frame and an entry of it, however deep, with their named scopes."""
    names = NameStack()
    frame = entry.parent if isinstance(entry, Frame) else entry.frame
    while frame is not None and frame is not home:
        call = frame.eqn
        own = call.source_info.name_stack
        if "name" in call.params:
            own = own.extend(f"jit({call.params['name']})")
        names, frame = own + names, frame.parent
    return names


def _common_names(nodes: Iterable[Node], home: Frame) -> NameStack:
    """The named scopes inside `home` that all of the nodes stand in."""
    stacks = [_names_around(n, home) + n.eqn.source_info.name_stack for n in nodes]
    depth = min(map(len, stacks))
    while depth and any(stack[:depth] != stacks[0][:depth] for stack in stacks):
        depth -= 1
    # What `einsum` adds names a product, not a layer.
    while depth and "->" in str(stacks[0][depth - 1 : depth]):
        depth -= 1
    return stacks[0][:depth]


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
        index: Any = None,
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
        units = self.writer.units.values()
        loops = {name: unit.loops for unit in units for name in unit.reported}
        apart = {name: r for name, r in reports.items() if body.scope in loops[name]}
        return apart, {name: r for name, r in reports.items() if name not in apart}

    def units(self, body: Body) -> list[SiteReplacement]:
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
