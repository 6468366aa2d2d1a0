"""The operation of a block on its top k: its modes, and what they read."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from hire_rewrite.cost.machine import gathered, whole
from hire_rewrite.graph.weights import narrow
from hire_rewrite.ops.ffn import ffn as ops
from hire_rewrite.ops.ffn.block import FFNSpec, FFNState
from hire_rewrite.ops.ffn.measured import measured_ffn
from hire_rewrite.ops.ffn.sharded import ffn_specs, sharded_ffn
from hire_rewrite.ops.predictors import LowRank, Predictor, Quantized, Read, reads_of
from hire_rewrite.rules import count
from hire_rewrite.sharding.rows import RowSharding
from hire_rewrite.sites.ffn.block import BlockOperation
from hire_rewrite.sites.ffn.exact import RawBlock
from hire_rewrite.sites.ffn.packing import packed_ffn
from hire_rewrite.sites.ffn.rule import FFN
from hire_rewrite.sites.ffn.sizes import TOKENS, FFNStatistics, ffn_statistics
from hire_rewrite.sites.kind import Functions, MatchedSite
from hire_rewrite.sites.operation import (
    SiteCalibration,
    counting,
    reporting,
    row_predictors,
    silent,
)
from hire_rewrite.sites.replacement import SiteReplacement
from hire_rewrite.sites.weight_rows import WeightRows


class FFNOperation(BlockOperation):
    """A block on its top k neurons."""

    spec: FFNSpec
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
        super().__init__(site, rule, spec, functions)
        self._statistics = statistics
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
            spec.criterion == "output", self.predictor,
        )  # fmt: skip

    @property
    def predictor(self) -> Predictor:
        return self.rule.predictor or Quantized()

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

        return [
            rows(candidates, spec.projections * up.in_dim, up_dtype),
            rows(kept, down.out_dim, down_dtype),
            *self._shared_reads(tokens),
            *reads_of(self.predictor, spec.scored_rows, up.in_dim, up_dtype, tokens),
            Read("scored_float32", 0, scores=tokens * spec.scored_rows),
        ]

    def pack(
        self,
        weights: WeightRows,
        calibration: SiteCalibration | None,
        advance: Callable[[], None],
    ) -> FFNState:
        return packed_ffn(self.site, self.predictor, self.spec, weights, calibration, advance)

    def rows(self, arrays: FFNState) -> Sequence[Any]:
        return arrays.up, arrays.down, arrays.predictor

    def partition_specs(self, arrays: Any) -> Any:
        assert isinstance(self.site.sharding, RowSharding)
        return ffn_specs(arrays, self.spec, self.predictor, self.site.sharding)

    def rewritten(self, arrays: Any) -> list[SiteReplacement]:
        return self._hired(arrays, counted=False)

    def counted(self, arrays: Any) -> list[SiteReplacement]:
        return self._hired(arrays, counted=True)

    @property
    def counted_units(self) -> int:
        return self.spec.groups // self.spec.num_shards

    @property
    def counted_by_call(self) -> bool:
        return True

    def _hired(self, arrays: Any, *, counted: bool) -> list[SiteReplacement]:
        sharding, predictor = self.site.sharding, self.predictor
        block: Callable[..., Any]
        if isinstance(sharding, RowSharding):
            together = bool(self._match.region.sides)
            block = functools.partial(
                sharded_ffn, sharding=sharding, together=together, counted=counted
            )
        else:
            block = counting(ops.counted_ffn) if counted else silent(ops.hire_ffn)
        block = functools.partial(block, predictor=predictor, budget=self.budget)
        key = ("rewritten", predictor, self.budget, sharding, counted)
        return self._replacements(block, arrays, key, reports=counted)

    def exact(self, arrays: Any) -> list[SiteReplacement]:
        return self._replacements(silent(ops.exact_ffn), arrays, ("exact",))

    def dense(self, arrays: Any) -> list[SiteReplacement]:
        return self._replacements(silent(ops.dense_ffn), arrays, ("dense",))

    def measured(self, arrays: Any, *, follow_exact: bool) -> list[SiteReplacement]:
        predictor = self.predictor
        block = reporting(measured_ffn, follow_exact, predictor=predictor)
        key = ("measured", predictor, follow_exact)
        return self._replacements(block, arrays, key, reports=True)

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
