"""The operation of a block: its modes, laid out as the function has it.

The operations of `ops.ffn` work on `[tokens, d]`. Here the axes of the traced values are moved to
that form and back, and the code between the products, which `ops` calls an activation, is the
function's own, run again on the rows that were gathered.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax

from hire_rewrite.cost.machine import gathered, whole
from hire_rewrite.graph.weights import narrow
from hire_rewrite.ops.ffn import ffn as ops
from hire_rewrite.ops.ffn.block import FFNSpec, FFNState
from hire_rewrite.ops.ffn.layer import add_joined, sibling_inputs
from hire_rewrite.ops.ffn.measured import measured_ffn
from hire_rewrite.ops.ffn.sharded import ffn_specs, sharded_ffn
from hire_rewrite.ops.predictors import LowRank, Predictor, Read, reads_of
from hire_rewrite.patterns.region import from_tokens, to_tokens
from hire_rewrite.rules import count
from hire_rewrite.sharding.rows import RowSharding
from hire_rewrite.sites.ffn.exact import RawBlock
from hire_rewrite.sites.ffn.experts import side_by_side
from hire_rewrite.sites.ffn.match import FFNMatch
from hire_rewrite.sites.ffn.packing import packed_ffn
from hire_rewrite.sites.ffn.rule import FFN
from hire_rewrite.sites.ffn.sizes import TOKENS, FFNStatistics, ffn_statistics
from hire_rewrite.sites.kind import Functions, MatchedSite
from hire_rewrite.sites.operation import (
    Operation,
    SiteCalibration,
    reporting,
    row_predictors,
    silent,
)
from hire_rewrite.sites.replacement import Run, SiteReplacement
from hire_rewrite.sites.weight_rows import WeightRows


class FFNOperation(Operation):
    """A block on its top k neurons."""

    rule: FFN
    exact_is_dense = False

    def __init__(
        self,
        site: MatchedSite,
        rule: FFN,
        spec: FFNSpec,
        statistics: FFNStatistics | None,
        undecided: bool,
        functions: Functions,
    ) -> None:
        self.site, self.rule, self.spec = site, rule, spec
        self._match: FFNMatch = site.match
        self._statistics, self._functions = statistics, functions
        if undecided:
            self.undecided = 'k="auto" is found by calibration: pack(..., calibration=batches)'
        self.unit, self.k, self.candidates = spec.group, spec.k_groups, spec.candidate_groups
        self.fixed_units = max(1, spec.common_groups)
        self.calibrated_tokens = TOKENS if statistics is not None and statistics.union else ()
        self.budget = None
        if rule.budget is not None:  # in groups
            neurons = count(rule.budget, spec.width, f"{site.name}: budget")
            self.budget = -(-neurons // spec.group)

    @property
    def layout(self) -> Hashable:
        spec = self.spec
        return (
            "ffn", spec.width, spec.group, spec.projections, spec.common_groups, spec.num_shards,
            spec.criterion == "output", self.rule.predictor,
        )  # fmt: skip

    @property
    def scored(self) -> tuple[int, int]:
        return self.spec.scored_rows, self.site.d_model

    @property
    def learns(self) -> bool:
        return True

    @property
    def needs_calibration(self) -> bool:
        return self.rule.k == "auto" or bool(self.rule.common) or super().needs_calibration

    def describe(self) -> str:
        return self.described_choice(self.spec.width, f", in groups of {self.unit}")

    def reads(self, tokens: int) -> list[Read]:
        """What one run reads.

        Rows of several tokens are counted as calibration found them shared; without it as if they
        shared none, which is what is gathered at most. Where that may be all of a block's rows, or
        is likely to be more than its budget, it is computed whole.
        """
        match, devices, statistics = self._match, self.site.sharding.num_shards, self._statistics
        spec = self.spec if devices == 1 else self.spec.shard
        budget = None if self.budget is None else -(-self.budget // devices)
        up, down = match.linears[0], match.down
        up_dtype, down_dtype = narrow(up.weight).dtype, narrow(down.weight).dtype
        groups = spec.gathered_groups(tokens, budget)
        candidates, everything = groups * spec.group, groups >= spec.groups
        union = None if statistics is None else statistics.gathered(tokens)
        if union is not None and not everything:
            union = -(-union // devices)
            everything = union > candidates
            candidates = min(candidates, max(union, spec.candidate_groups * spec.group))
        if everything:
            candidates = spec.width
        kept = min(candidates, tokens * spec.k_groups * spec.group)

        def rows(neurons: int, numbers: int, dtype: object) -> Read:
            if everything:
                return whole(neurons * numbers, dtype, tokens)
            return gathered(-(-neurons // spec.group), neurons * numbers, dtype, tokens)

        joined = sum(value.shape[match.piece.axis] for value, _ in match.piece.others)
        siblings = (item for sibling in match.region.siblings for item in sibling.projections)
        fused = sum(item.window.size for item in siblings)
        return [
            rows(candidates, spec.projections * up.in_dim, up_dtype),
            rows(kept, down.out_dim, down_dtype),
            whole(joined * down.out_dim, down_dtype, tokens),
            whole(fused * up.in_dim, up_dtype, tokens),
            *reads_of(self.rule.predictor, spec.scored_rows, up.in_dim, up_dtype, tokens),
            Read("scored_float32", 0, scores=tokens * spec.scored_rows),
        ]

    def pack(
        self,
        weights: WeightRows,
        calibration: SiteCalibration | None,
        advance: Callable[[], None],
    ) -> FFNState:
        return packed_ffn(self.site, self.rule, self.spec, weights, calibration, advance)

    def rows(self, arrays: FFNState) -> Sequence[Any]:
        return arrays.up, arrays.down

    def partition_specs(self, arrays: Any) -> Any:
        assert isinstance(self.site.sharding, RowSharding)
        return ffn_specs(arrays, self.spec, self.rule.predictor, self.site.sharding)

    def rewritten(self, arrays: Any) -> list[SiteReplacement]:
        block, sharding = ops.hire_ffn, self.site.sharding
        if isinstance(sharding, RowSharding):
            together = bool(self._match.region.sides)
            block = functools.partial(sharded_ffn, sharding=sharding, together=together)
        block = functools.partial(block, predictor=self.rule.predictor, budget=self.budget)
        return self._replacements(silent(block), arrays, ("rewritten", self.budget, sharding))

    def exact(self, arrays: Any) -> list[SiteReplacement]:
        return self._replacements(silent(ops.exact_ffn), arrays, ("exact",))

    def dense(self, arrays: Any) -> list[SiteReplacement]:
        return self._replacements(silent(ops.dense_ffn), arrays, ("dense",))

    def measured(self, arrays: Any, *, follow_exact: bool) -> list[SiteReplacement]:
        block = reporting(measured_ffn, follow_exact, predictor=self.rule.predictor)
        return self._replacements(block, arrays, ("measured", follow_exact), reports=True)

    def exact_form(self) -> SiteReplacement:
        block = RawBlock(self._match, self.spec)
        return self.raw_replacement(block.inputs, block.exact_ffn)

    def observed(self) -> SiteReplacement:
        block = RawBlock(self._match, self.spec)

        def run(ins: Sequence[Any], *_: Any) -> Any:
            return block.observed(ins, shares=self.undecided is not None)

        return dataclasses.replace(self.replacement(run, None, reports=True), inputs=block.inputs)

    def statistics(self, calibration: SiteCalibration) -> FFNStatistics:
        return ffn_statistics(calibration[1], self.spec, self.rule, self.undecided is not None)

    def with_candidates(self, candidates: int) -> FFNOperation:
        groups = -(-candidates // self.spec.num_shards) * self.spec.num_shards
        rule = self.rule.replace(k=self.k * self.unit, candidates=groups * self.unit)
        spec = dataclasses.replace(self.spec, candidate_groups=groups)
        return FFNOperation(self.site, rule, spec, None, False, self._functions)

    def tuned_rule(self) -> FFN:
        if self.undecided is not None:
            return self.rule
        k, candidates = (units * self.unit for units in (self.k, self.candidates))
        return self.rule.replace(k=k, candidates=candidates, group=self.unit)

    def predictors(self, ranks: Sequence[int]) -> list[Predictor]:
        return row_predictors(ranks, self.site.d_model)

    def probe_predictor(self) -> Predictor:
        return LowRank()

    def _replacements(
        self, block: Callable[..., Any], arrays: Any, key: Hashable, *, reports: bool = False
    ) -> list[SiteReplacement]:
        """The replacement of the block, and that of what shares a product with it.

        Args:
          block: (x: [tokens, d], arrays, layer, spec, activation) to [tokens, d_out] and a report.
          key: what tells it from other blocks.
        """
        run = self._run(functools.partial(block, spec=self.spec), key)
        replacements = [self.replacement(run, arrays, reports=reports)]
        if self._match.shared:
            replacements.append(self._fused(arrays))
        return replacements

    def _run(self, block: Callable[..., Any], key: Hashable) -> Run:
        match, region, spec = self._match, self._match.region, self.spec
        side_inputs = len(region.sides)
        key = (region.signature, match.piece.axis, spec, self.rule.predictor, key)
        if match.experts > 1:
            return side_by_side(match, block, self._functions, key)

        def hire_ffn(x: Any, ins: Sequence[Any], arrays: Any, layer: Any) -> Any:
            known = dict(zip(region.sides, ins[:side_inputs], strict=True))
            joined = [to_tokens(other, (match.piece.axis,)) for other in ins[side_inputs:]]

            def activation(pre: Sequence[Any], vectors: Sequence[Any]) -> Any:
                return region.run(pre, vectors, known)

            y, report = block(x, arrays, layer, activation=activation)
            return add_joined(y, joined, arrays, layer, spec=spec), report

        jitted = self._functions.setdefault(key, jax.jit(hire_ffn))

        def run(ins: Sequence[Any], layer: Any, arrays: Any) -> Any:
            x, *rest = ins
            y, report = jitted(to_tokens(x, match.x_axes), rest, arrays, layer)
            return [from_tokens(y, match.down.out.shape, match.down.out_axes)], report

        return run

    def _fused(self, arrays: Any) -> SiteReplacement:
        """The other parts of a fused product, from rows of their own."""
        match, siblings = self._match, self._match.region.siblings
        sides = tuple(dict.fromkeys(side for sibling in siblings for side in sibling.sides))

        def run(ins: Sequence[Any], layer: Any, arrays: Any) -> Any:
            x, *side_inputs = ins
            tokens = to_tokens(x, match.x_axes)
            known = dict(zip(sides, side_inputs, strict=True))
            results = []
            for sibling, part in zip(siblings, arrays.fused, strict=True):
                pre, vectors = sibling_inputs(tokens, part, layer, spec=self.spec)
                result = sibling.run(pre, vectors, known)
                results.append(from_tokens(result, sibling.value.shape, (sibling.axis,)))
            return results, None

        return dataclasses.replace(
            self.replacement(run, arrays),
            name=f"{self.site.name} (fused)",
            nodes=match.shared,
            inputs=(match.x, *sides),
            outputs=tuple(sibling.value for sibling in siblings),
        )
