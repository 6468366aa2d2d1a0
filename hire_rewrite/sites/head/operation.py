"""The operation of a head: its modes, laid out as the function has it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from hire_rewrite.cost.machine import gathered
from hire_rewrite.graph.evaluate import look_up, run_node
from hire_rewrite.graph.weights import narrow
from hire_rewrite.ops.encodings import Coarse, fetched_kind
from hire_rewrite.ops.gather import gather_rows
from hire_rewrite.ops.head import head as ops
from hire_rewrite.ops.head.logits import exact_values
from hire_rewrite.ops.head.measured import measured_head
from hire_rewrite.ops.head.sharded import head_specs, sharded_head
from hire_rewrite.ops.head.spec import HeadSpec, HeadState
from hire_rewrite.ops.lookup import sharded_lookup
from hire_rewrite.ops.predictors import (
    Cascade,
    Certifying,
    LowRank,
    Predictor,
    Quantized,
    Read,
    certifies,
    reads_of,
)
from hire_rewrite.ops.top_k.merge import cheapest, described
from hire_rewrite.ops.usage import Usage
from hire_rewrite.patterns.region import to_tokens
from hire_rewrite.sharding.rows import RowSharding
from hire_rewrite.sites.head.epilogue import epilogue_of, logit_top_k, output_values
from hire_rewrite.sites.head.match import HeadMatch
from hire_rewrite.sites.head.rule import Head
from hire_rewrite.sites.kind import MatchedSite, StaysDense
from hire_rewrite.sites.lookup import lookup_replacements
from hire_rewrite.sites.operation import (
    Operation,
    SiteCalibration,
    counting,
    reporting,
    row_predictors,
    silent,
)
from hire_rewrite.sites.replacement import SiteReplacement, arguments
from hire_rewrite.sites.weight_rows import (
    WeightRows,
    all_finite,
    fit_bounds,
    fit_predictor,
    stored_rows,
)


class HeadOperation(Operation):
    """A head whose k greatest logits are exact."""

    rule: Head

    def __init__(
        self, site: MatchedSite, rule: Head, spec: HeadSpec, *, lossless: bool = False
    ) -> None:
        self.site, self.rule, self.spec = site, rule, spec
        self._lossless = spec.exact is None or lossless
        self._match: HeadMatch = site.match
        self.k, self.candidates = spec.k, spec.candidates
        self.exact_is_dense = spec.tail == "predicted"
        self.proves = bool(spec.certify)
        self._lookups = self._match.lookups if spec.exact is not None and rule.lookups else ()
        if spec.certify and not self._lossless:
            self.unexamined = (
                f"packing looks whether {spec.exact} holds its numbers exactly, without which "
                "certify can prove nothing about the model's own logits"
            )

    @property
    def layout(self) -> Hashable:
        spec = self.spec
        stored = () if spec.exact is None else (spec.exact,)
        certify = bool(spec.certify)
        return "head", spec.width, spec.num_shards, certify, self.predictor, *stored

    @property
    def predictor(self) -> Predictor:
        return self.rule.guesses_by

    @property
    def scored(self) -> tuple[int, int]:
        return self.spec.rows, self.site.d_model

    def describe(self) -> str:
        proved = f", {self.spec.certify} proved" if self.spec.certify else ""
        stored = "" if self.spec.exact is None else f" as {self.spec.exact}"
        depth = self._match.ranked.depth
        asked = f"; the program reads {depth}: give k={depth}" if depth > self.spec.k else ""
        chosen = self.described_choice(self.spec.width, stored + proved)
        return chosen + self._described_merge() + asked

    def _described_merge(self) -> str:
        """What devices send each other."""
        spec, sharding = self.spec, self.site.sharding
        if not isinstance(sharding, RowSharding) or spec.tail == "-inf":
            return ""
        sizes = [sharding.mesh.shape[axis] for axis in sharding.axes]
        kept = min(spec.k, spec.candidates // spec.num_shards)
        rows = self.site.tokens // sharding.token_shards(self.site.tokens)
        merge = cheapest(sharding.axes, sizes, kept, spec.k, rows=rows)
        return f", compared by {described(merge, rows)}"

    def reads(self, tokens: int) -> list[Read]:
        spec, linear = self.spec, self._match.linear
        d, dtype = linear.in_dim, narrow(linear.weight).dtype
        outputs, rows = len(self._match.outputs), spec.shard_rows
        reads = [*reads_of(self.predictor, rows, d, dtype, tokens)]
        reads.append(Read("scored_float32", 0, scores=tokens * rows * outputs))
        if spec.certify:  # two norms of each row, in float32
            reads.append(Read("scored_float32", 8 * spec.width))
        candidates = tokens * (spec.candidates // spec.num_shards) * outputs
        # Each token has rows of its own; what several ask for comes from memory once.
        if spec.exact is None:
            read = gathered(candidates, candidates * d, dtype, 1)
            distinct = min(candidates, rows) * d * dtype.itemsize
        else:
            kind = fetched_kind(spec.exact)
            read = Read(kind, spec.exact.bytes(candidates, d), pieces=candidates)
            distinct = spec.exact.bytes(min(candidates, rows), d)
        return [*reads, read._replace(distinct=distinct)]

    def pack(
        self,
        weights: WeightRows,
        calibration: SiteCalibration | None,
        advance: Callable[[], None],
    ) -> HeadState:
        spec, predictor, linear = self.spec, self.predictor, self._match.linear
        moments = None if calibration is None else calibration[0]
        fitted: Any = {}
        bound: Any = {}
        if spec.exact is not None and spec.num_shards == 1:
            stored: Any = weights.matrices(linear).stored(spec.exact)
            if isinstance(predictor, Coarse) and not spec.certify:
                return HeadState(stored, fitted)
            rows = self._model_rows(weights)
        else:
            rows = self._model_rows(weights)
            stored = rows if spec.exact is None else stored_rows(spec.exact, rows)
        if not isinstance(predictor, Coarse):
            fitted = fit_predictor(predictor, rows, moments, advance, spec.candidates)
        state = HeadState(stored, fitted, bound)
        if spec.certify:
            assert isinstance(predictor, Certifying)
            wide, arrays = rows.astype(spec.compute_dtype), state.guessing(predictor)
            state = state._replace(bound=fit_bounds(predictor, wide, arrays))
        return state

    def _model_rows(self, weights: WeightRows) -> jax.Array:
        """[layers, spec.rows, d], the rows as the model has them, on the devices that have them."""
        spec, rows = self.spec, weights.linear(self._match.linear)
        if spec.rows > spec.width:  # by nothing it would copy them
            rows = jnp.pad(rows, ((0, 0), (0, spec.rows - spec.width), (0, 0)))
        placed: jax.Array = self.site.sharding.put_rows(rows, 1)
        return placed

    @property
    def examines(self) -> bool:
        return True

    def examine(self, weights: WeightRows) -> bool | StaysDense | None:
        """True if what is stored has to hold the numbers exactly, and does."""

        def finite(rows: WeightRows) -> jax.Array:
            return all_finite(rows.matrices(self._match.linear).array)[None]

        if not bool(weights.on_devices(finite, self.site.sharding).all()):
            return StaysDense("its weight holds a NaN or an infinity, which cannot be ranked")
        exact = self.spec.exact
        if exact is None or not self.spec.certify:
            return None
        if exact.store_exactly(weights.matrices(self._match.linear).on_host()) is not None:
            return True
        return StaysDense(
            f"{exact} does not hold its numbers exactly, and certify proves what the model itself "
            "returns; leave out certify or exact"
        )

    @property
    def holds_weights(self) -> bool:
        """Where no encoding was asked for, or it is known to have lost nothing."""
        return self._lossless

    def with_weights(self, arrays: HeadState, weights: WeightRows) -> HeadState:
        return arrays._replace(dense=self._model_rows(weights))

    def rows(self, arrays: HeadState) -> Sequence[Any]:
        return arrays.rows, arrays.predictor

    def partition_specs(self, arrays: Any) -> Any:
        assert isinstance(self.site.sharding, RowSharding)
        return head_specs(arrays, self.site.d_model, self.spec, self.predictor, self.site.sharding)

    def rewritten(self, arrays: Any) -> list[SiteReplacement]:
        head, sharding = ops.hire_head, self.site.sharding
        if isinstance(sharding, RowSharding):
            head = functools.partial(sharded_head, sharding=sharding)
        head = functools.partial(head, predictor=self.predictor)
        searches = logit_top_k(self.site.name, self._match, sharding, self.spec.recall_target)
        return [self._replacement(silent(head), arrays), *searches, *self._looking_up(arrays)]

    def counted(self, arrays: Any) -> list[SiteReplacement]:
        if isinstance(self.site.sharding, RowSharding):  # never proved, and never read whole
            outputs = len(self._match.outputs)
            read = self.site.tokens * self.spec.candidates * outputs
            head, *others = self.rewritten(arrays)
            return [self.tallied(head, Usage(read)), *others]
        _, *others = self.rewritten(arrays)
        counted = functools.partial(counting(ops.counted_head), predictor=self.predictor)
        return [self._replacement(counted, arrays, reports=True), *others]

    @property
    def counted_units(self) -> int:
        return self.spec.width

    def exact(self, arrays: Any) -> list[SiteReplacement]:
        return [self._replacement(silent(ops.exact_head), arrays), *self._looking_up(arrays)]

    def dense(self, arrays: Any) -> list[SiteReplacement]:
        return [self._replacement(silent(ops.dense_head), arrays), *self._looking_up(arrays)]

    def measured(self, arrays: Any, *, follow_exact: bool) -> list[SiteReplacement]:
        head = reporting(measured_head, follow_exact, predictor=self.predictor)
        return [self._replacement(head, arrays, reports=True), *self._looking_up(arrays)]

    def exact_form(self) -> SiteReplacement:
        match = self._match
        inputs = arguments((*match.linear.node.ins, *match.side_inputs))

        def exact_head(ins: Sequence[Any]) -> list[Any]:
            env = dict(zip(inputs, ins, strict=True))
            for node in match.product:
                run_node(node, env)
            raw = to_tokens(env[match.logits], (match.axis,))
            epilogue = epilogue_of(match, {v: look_up(v, env) for v in match.side_inputs})
            return output_values(match, exact_values(raw, spec=self.spec, endpoints=epilogue))

        return self.raw_replacement(inputs, exact_head)

    def with_candidates(self, candidates: int) -> HeadOperation:
        shards = self.spec.num_shards
        last = self.spec.width - (shards - 1) * self.spec.shard_rows
        rows = min(-(-candidates // shards), last) * shards
        k = min(self.spec.k, candidates)
        spec = dataclasses.replace(self.spec, k=k, candidates=rows)
        rule = self.rule.replace(k=k, candidates=rows)
        return HeadOperation(self.site, rule, spec, lossless=self._lossless)

    def predictors(self, ranks: Sequence[int]) -> list[Predictor]:
        if isinstance(self.predictor, Coarse):  # whatever is held besides reads more
            return [self.predictor]
        rows, d = self.scored
        keep = max(1024, rows // 24)
        choices = row_predictors(ranks, d)
        if 4 * keep <= rows:
            choices += [Cascade(LowRank(rank), Quantized(), keep) for rank in ranks]
        if self.spec.certify:
            choices = [predictor for predictor in choices if certifies(predictor)]
        return choices

    def probe_predictor(self) -> Predictor:
        if isinstance(self.predictor, Coarse):
            return self.predictor
        return Quantized() if self.spec.certify else LowRank()

    def _looking_up(self, arrays: HeadState) -> list[SiteReplacement]:
        """What takes the place of the lookups of rows."""
        spec, sharding = self.spec, self.site.sharding

        def of_device(state: HeadState, layer: Any, places: Array) -> Array:
            if state.dense is not None:
                return gather_rows(state.dense, layer, places)
            assert spec.exact is not None
            return spec.exact.decode_rows(state.rows, layer, places)

        decode = of_device
        if isinstance(sharding, RowSharding):
            decode = functools.partial(
                sharded_lookup,
                of_device,
                count=spec.shard_rows,
                specs=self.partition_specs(arrays),
                sharding=sharding,
            )
        return lookup_replacements(self.site, self._lookups, arrays, decode)

    def _replacement(
        self, head: Callable[..., Any], arrays: Any, *, reports: bool = False
    ) -> SiteReplacement:
        """The head by (x: [tokens, d], arrays, layer, spec, endpoints) to the outputs
        [tokens, V] and a report."""
        match, spec = self._match, self.spec

        def hire_head(x: Any, sides: Sequence[Any], arrays: Any, layer: Any) -> Any:
            epilogue = epilogue_of(match, dict(zip(match.side_inputs, sides, strict=True)))
            return head(x, arrays, layer, spec=spec, endpoints=epilogue)

        def run(ins: Sequence[Any], layer: Any, arrays: Any) -> Any:
            x, *sides = ins
            rows = to_tokens(x, match.linear.x_axes)
            values, report = jax.jit(hire_head)(rows, sides, arrays, layer)
            return output_values(match, values), report

        return self.replacement(run, arrays, reports=reports)
