"""What a linear layer is rewritten to."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from hire_rewrite.cost.machine import Machine
from hire_rewrite.graph.nodes import Node
from hire_rewrite.ops.encodings import Encoding, Float, narrowest
from hire_rewrite.ops.gather import gather_rows
from hire_rewrite.ops.linear.linear import (
    LinearSpec,
    LinearState,
    exact_linear,
    hire_linear,
    hire_linears,
    tokenwise_linear,
)
from hire_rewrite.ops.linear.sharded import sharded_linears
from hire_rewrite.ops.lookup import sharded_lookup
from hire_rewrite.ops.predictors import Read
from hire_rewrite.ops.quality import Comparison, Measured
from hire_rewrite.ops.usage import Usage
from hire_rewrite.patterns.region import from_tokens, to_tokens
from hire_rewrite.sharding.rows import RowSharding
from hire_rewrite.sites.kind import MatchedSite, StaysDense
from hire_rewrite.sites.linear.experts import on_tokens
from hire_rewrite.sites.linear.rule import Linear
from hire_rewrite.sites.linear.shards import narrowest_of_shards, shard_size, stored_shards
from hire_rewrite.sites.lookup import lookup_replacements
from hire_rewrite.sites.operation import Operation, SiteCalibration, reporting
from hire_rewrite.sites.replacement import Joint, SiteReplacement
from hire_rewrite.sites.weight_rows import WeightRows

Run = Callable[..., Sequence[Array]]
"""(x: [tokens, d], states, layer, spec) to [tokens, n] of each state."""


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
        shards = self.site.sharding.num_shards
        return "linear", self.scored, shards, self.spec.encoding, self.spec.columns

    @property
    def scored(self) -> tuple[int, int]:
        """Of one device."""
        return shard_size(self.layer, self.site.sharding)

    @property
    def keeps_gradient(self) -> bool:
        return self.rule.encoding is None and not self.spec.round_inputs

    def describe(self) -> str:
        spec, where = self.spec, self.site.sharding.describe()
        if self.rule.encoding is None:
            return f"the same numbers as {spec.encoding}{where}"
        exact = f", {spec.k} of {self.layer.in_dim} inputs exactly" if spec.k else ""
        rounded = ", inputs rounded to 8 bits" if self.rule.round_inputs else ""
        return f"as {spec.encoding}{rounded}{exact}{where}"

    def reads(self, tokens: int) -> Sequence[Read]:
        spec, (n, d) = self._device_spec, self.scored
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
        dtype = self.site.linears[0].weight.dtype
        if self._sharded:
            found = narrowest_of_shards(weights, self.layer, self.site.sharding)
        else:
            stored = narrowest(weights.matrices(self.layer).on_host())
            found = None if stored is None else stored[0]
        if found is not None:
            return found
        narrower = "" if jnp.finfo(dtype).bits <= 16 else " and are not bfloat16 numbers"
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
        if self._sharded:  # see `encoded`
            return LinearState({"rows": weights.linear(self.layer)}, {})
        spec, matrices = self.spec, weights.matrices(self.layer)
        columns = {} if spec.columns is None else matrices.transposed.stored(spec.columns)
        return LinearState(matrices.stored(spec.encoding), columns)

    def encoded(self, arrays: LinearState) -> LinearState:
        spec, sharding = self.spec, self.site.sharding
        if not self._sharded:
            return arrays
        shards, columns = sharding.shards(arrays.rows["rows"]), {}
        if spec.columns is not None:
            columns = stored_shards(shards, spec.columns, sharding, transposed=True)
        return LinearState(stored_shards(shards, spec.encoding, sharding), columns)

    def rows(self, arrays: LinearState) -> Sequence[Any]:
        # Floats hold a NaN and an infinity as they are, and their products are the dense ones; but
        # a column is not read where its input is zero.
        rows = {} if isinstance(self.spec.encoding, Float) else arrays.rows
        return rows, arrays.columns

    def partition_specs(self, arrays: LinearState) -> Any:
        return jax.tree.map(lambda _: PartitionSpec(self.site.sharding.axes), arrays)

    @property
    def holds_weights(self) -> bool:
        """Where no encoding was asked for, or the columns are all there as the model has them."""
        rule = self.rule
        return rule.encoding is None or (rule.k != 0 and rule.exact is None)

    def with_weights(self, arrays: LinearState, weights: WeightRows) -> LinearState:
        return arrays._replace(dense=weights.shards(self.layer, self.site.sharding))

    def rewritten(self, arrays: LinearState) -> list[SiteReplacement]:
        return [self._hired(arrays), *self._looking_up(arrays)]

    def counted(self, arrays: LinearState) -> list[SiteReplacement]:
        spec, tokens, (_, d) = self._device_spec, self.site.tokens, self.scored
        whole = isinstance(tokens, int) and spec.takes_all(tokens, d)
        layer, *others = self.rewritten(arrays)
        usage = Usage(0 if whole else tokens * spec.k, whole=whole)
        return [self.tallied(layer, usage), *others]

    @property
    def chooses(self) -> bool:
        return bool(self.spec.k)

    @property
    def counted_units(self) -> int:
        """Inputs of one device."""
        return self.scored[1]

    def exact(self, arrays: LinearState) -> list[SiteReplacement]:
        def alone(x: Array, state: LinearState, layer: Any) -> tuple[Array, None]:
            return self._products(_exact_each, x, [state], layer)[0], None

        return [self._replacement(alone, arrays), *self._looking_up(arrays)]

    dense = exact

    def measured(self, arrays: LinearState, *, follow_exact: bool) -> list[SiteReplacement]:
        def both(x: Array, state: LinearState, layer: Any) -> Measured:
            runs = _exact_each, _tokenwise_each
            exact, rewritten = (self._products(run, x, [state], layer)[0] for run in runs)
            return Measured(exact, rewritten, Comparison(exact, exact, rewritten))

        run = reporting(both, follow_exact)
        return [self._replacement(run, arrays, reports=True), *self._looking_up(arrays)]

    @property
    def _sharded(self) -> bool:
        """Whether devices have shards of the weight: over a mesh, or in a manual region."""
        return self.site.sharding.mesh is not None

    @property
    def _device_spec(self) -> LinearSpec:
        """What one device computes."""
        sharding = self.site.sharding
        columns = sharding.num_columns if isinstance(sharding, RowSharding) else 1
        return self.spec.of_columns(columns)

    def _products(
        self, run: Run, x: Array, states: Sequence[LinearState], layer: Any
    ) -> Sequence[Array]:
        """[tokens, n] of each of several weights for x: [tokens, d]."""
        sharding = self.site.sharding
        if isinstance(sharding, RowSharding):
            return sharded_linears(run, x, states, layer, spec=self.spec, sharding=sharding)
        return run(x, states, layer, spec=self.spec)

    def _looking_up(self, arrays: LinearState) -> list[SiteReplacement]:
        """What takes the place of the lookups of rows."""
        encoding, sharding = self.spec.encoding, self.site.sharding

        def of_device(state: LinearState, layer: Any, places: Array) -> Array:
            if state.dense is not None:
                return gather_rows(state.dense, layer, places)
            return encoding.decode_rows(state.rows, layer, places)

        decode = of_device
        if isinstance(sharding, RowSharding):
            decode = functools.partial(
                sharded_lookup,
                of_device,
                count=self.scored[0],
                specs=PartitionSpec(sharding.axes),
                sharding=sharding,
            )
        return lookup_replacements(self.site, self._lookups, arrays, decode)

    def _hired(self, arrays: LinearState) -> SiteReplacement:
        """The layer from its copy, together with others of the same input."""
        layer, sharding = self.layer, self.site.sharding

        def start(ins: Sequence[Any], index: Any, states: Sequence[LinearState]) -> Sequence[Array]:
            x = to_tokens(ins[0], layer.x_axes)
            return self._products(_hire_each, x, states, index)

        def finish(y: Array) -> Sequence[Array]:
            return [from_tokens(y.astype(layer.out.dtype), layer.out.shape, layer.out_axes)]

        if layer.batch:
            return self._replacement(
                lambda x, state, index: (self._products(_hire_each, x, [state], index)[0], None),
                arrays,
            )
        over = sharding if isinstance(sharding, RowSharding) else None
        joint = Joint((self.spec, layer.x_axes, over), start, finish)
        return dataclasses.replace(self.replacement(joint.run, arrays), joint=joint)

    def _replacement(
        self, function: Callable[..., Any], arrays: LinearState, *, reports: bool = False
    ) -> SiteReplacement:
        """The layer by (x: [tokens, d], arrays, layer) to [tokens, n] and a report."""
        linear = self.layer

        def run(ins: Sequence[Any], layer: Any, state: LinearState) -> Any:
            def of_tokens(x: Array, layer: Any) -> tuple[Sequence[Array], Any]:
                y, report = function(x, state, layer)
                return [y.astype(linear.out.dtype)], report

            return on_tokens(linear, of_tokens, ins[0], layer)

        return self.replacement(run, arrays, reports=reports)


_hire = jax.jit(hire_linear, static_argnames="spec")
_hire_several = jax.jit(hire_linears, static_argnames="spec")
_exact = jax.jit(exact_linear, static_argnames="spec")
_tokenwise = jax.jit(tokenwise_linear, static_argnames="spec")
"""In a jaxpr and a profile each is one call with a name."""


def _hire_each(
    x: Array, states: Sequence[LinearState], layer: Any, *, spec: LinearSpec
) -> Sequence[Array]:
    if len(states) == 1:
        return [_hire(x, states[0], layer, spec=spec)]
    several: Sequence[Array] = _hire_several(x, states, layer, spec=spec)
    return several


def _exact_each(
    x: Array, states: Sequence[LinearState], layer: Any, *, spec: LinearSpec
) -> Sequence[Array]:
    return [_exact(x, state, layer, spec=spec) for state in states]


def _tokenwise_each(
    x: Array, states: Sequence[LinearState], layer: Any, *, spec: LinearSpec
) -> Sequence[Array]:
    return [_tokenwise(x, state, layer, spec=spec) for state in states]
