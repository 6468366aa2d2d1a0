"""What a linear layer is rewritten to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from hire_rewrite.cost.machine import Machine
from hire_rewrite.graph.nodes import Node
from hire_rewrite.ops.encodings import Encoding, narrowest
from hire_rewrite.ops.gather import gather_rows
from hire_rewrite.ops.linear.linear import (
    LinearSpec,
    LinearState,
    exact_linear,
    hire_linear,
    hire_linears,
)
from hire_rewrite.ops.predictors import Read
from hire_rewrite.ops.quality import Comparison, Measured
from hire_rewrite.patterns.region import from_tokens, to_tokens
from hire_rewrite.sites.kind import MatchedSite, StaysDense
from hire_rewrite.sites.linear.lookup import looked_up
from hire_rewrite.sites.linear.rule import Linear
from hire_rewrite.sites.operation import Operation, SiteCalibration, reporting, silent
from hire_rewrite.sites.replacement import Joint, SiteReplacement
from hire_rewrite.sites.weight_rows import WeightRows


class LinearOperation(Operation):
    """A linear layer in an encoding.

    Attributes:
      spec: None where packing has yet to see whether fewer bits hold the same numbers.
    """

    rule: Linear

    def __init__(self, site: MatchedSite, rule: Linear, spec: LinearSpec | None) -> None:
        self.site, self.rule, self._spec = site, rule, spec
        self.layer = site.match.layer
        reads = rule.encoding is None if rule.lookups is None else rule.lookups
        self._lookups: tuple[Node, ...] = site.match.lookups if reads else ()
        if spec is None:
            self.unexamined = (
                "packing looks whether fewer bits hold the same numbers, and if none do they stay "
                "as they are; Linear(encoding=...) asks for fewer"
            )

    @property
    def spec(self) -> LinearSpec:
        assert self._spec is not None
        return self._spec

    @property
    def layout(self) -> Hashable:
        return "linear", self.scored, self.spec.encoding, self.spec.columns

    @property
    def scored(self) -> tuple[int, int]:
        return self.layer.out_dim, self.layer.in_dim

    def describe(self) -> str:
        spec = self.spec
        if self.rule.encoding is None:
            return f"the same numbers as {spec.encoding}"
        exact = f", {spec.k} of {self.layer.in_dim} inputs exactly" if spec.k else ""
        return f"as {spec.encoding}{exact}"

    def reads(self, tokens: int) -> Sequence[Read]:
        spec, (n, d) = self.spec, self.scored
        if spec.columns is not None and spec.takes_all(tokens, d):
            return spec.columns.reads(d, n, tokens)
        reads = [*spec.encoding.reads(n, d, tokens)]
        if spec.columns is not None:
            size = spec.columns.bytes(spec.k * tokens, n)
            reads.append(Read("fetched_float32", size, pieces=spec.k * tokens, scores=d * tokens))
        return reads

    def overhead(self, machine: Machine) -> float:
        """A product is called as a dense one is; what is chosen besides is a site."""
        return machine.site if self.spec.k else machine.product

    def tuned_rule(self) -> Linear:
        return self.rule.replace(encoding=self.spec.encoding, lookups=bool(self._lookups))

    def examine(self, weights: WeightRows) -> Encoding | StaysDense:
        rows = weights.matrices(self.layer).on_host()
        found = narrowest(rows)
        if found is not None:
            return found[0]
        narrower = "" if jnp.finfo(rows.dtype).bits <= 16 else " and are not bfloat16 numbers"
        return StaysDense(
            "its numbers fit no grid of 8 or 4 bits (a scale, and perhaps a minimum, for each row "
            f"or for 128, 64 or 32 of its numbers){narrower}, so they stay as they are; "
            "Linear(encoding=...) rounds them"
        )

    def pack(
        self,
        weights: WeightRows,
        calibration: SiteCalibration | None,
        advance: Callable[[], None],
    ) -> LinearState:
        spec, matrices = self.spec, weights.matrices(self.layer)
        columns = {} if spec.columns is None else matrices.transposed.stored(spec.columns)
        return LinearState(matrices.stored(spec.encoding), columns)

    @property
    def holds_weights(self) -> bool:
        """Where no encoding was asked for, or the columns are all there as the model has them."""
        rule = self.rule
        return rule.encoding is None or (rule.k != 0 and rule.exact is None)

    def with_weights(self, arrays: LinearState, weights: WeightRows) -> LinearState:
        return arrays._replace(dense=weights.linear(self.layer))

    def rewritten(self, arrays: LinearState) -> list[SiteReplacement]:
        return [self._hired(arrays), *self._looking_up(arrays)]

    def exact(self, arrays: LinearState) -> list[SiteReplacement]:
        return [self._replacement(silent(_exact), arrays), *self._looking_up(arrays)]

    dense = exact

    def measured(self, arrays: LinearState, *, follow_exact: bool) -> list[SiteReplacement]:
        def both(x: Array, state: LinearState, layer: Any) -> Measured:
            exact, rewritten = (run(x, state, layer, spec=self.spec) for run in (_exact, _hire))
            return Measured(exact, rewritten, Comparison(exact, exact, rewritten))

        run = reporting(both, follow_exact)
        return [self._replacement(run, arrays, reports=True), *self._looking_up(arrays)]

    def _looking_up(self, arrays: LinearState) -> list[SiteReplacement]:
        """What takes the place of the lookups of rows."""
        site, encoding = self.site, self.spec.encoding

        def replacement(node: Node) -> SiteReplacement:
            def run(ins: Sequence[Any], layer: Any, state: LinearState) -> Any:
                def decode(places: Array) -> Array:
                    if state.dense is not None:
                        return gather_rows(state.dense, layer, places)
                    return encoding.decode_rows(state.rows, layer, places)

                return [looked_up(node, ins[0], decode)], None

            where = frozenset({node}), (node.ins[1],), tuple(node.outs)
            return SiteReplacement(site.name, *where, run, arrays, site.sharding.region, site.loops)

        return [replacement(node) for node in self._lookups]

    def _hired(self, arrays: LinearState) -> SiteReplacement:
        """The layer from its copy, together with others of the same input."""
        layer, spec = self.layer, self.spec

        def start(ins: Sequence[Any], index: Any, states: Sequence[LinearState]) -> Sequence[Array]:
            x = to_tokens(ins[0], layer.x_axes)
            if len(states) == 1:
                return [_hire(x, states[0], index, spec=spec)]
            return _hire_several(x, states, index, spec=spec)

        def finish(y: Array) -> Sequence[Array]:
            return [from_tokens(y.astype(layer.out.dtype), layer.out.shape, layer.out_axes)]

        joint = Joint((spec, layer.x_axes), start, finish)
        return dataclasses.replace(self.replacement(joint.run, arrays), joint=joint)

    def _replacement(
        self, function: Callable[..., Any], arrays: LinearState, *, reports: bool = False
    ) -> SiteReplacement:
        linear, settings = self.layer, {} if reports else {"spec": self.spec}

        def run(ins: Sequence[Any], layer: Any, state: LinearState) -> Any:
            y, report = function(to_tokens(ins[0], linear.x_axes), state, layer, **settings)
            y = y.astype(linear.out.dtype)
            return [from_tokens(y, linear.out.shape, linear.out_axes)], report

        return self.replacement(run, arrays, reports=reports)


_hire = jax.jit(hire_linear, static_argnames="spec")
_hire_several = jax.jit(hire_linears, static_argnames="spec")
_exact = jax.jit(exact_linear, static_argnames="spec")
"""In a jaxpr and a profile each is one call with a name."""
