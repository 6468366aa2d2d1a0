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

from hire_rewrite.ops.ffn import ffn as ops
from hire_rewrite.ops.ffn.block import Activation, FFNSpec, FFNState
from hire_rewrite.ops.ffn.layer import add_joined, sibling_inputs
from hire_rewrite.ops.ffn.measured import measured_ffn
from hire_rewrite.ops.ffn.sharded import ffn_specs, sharded_ffn
from hire_rewrite.ops.predictors import LowRank, Predictor, Quantized, Read
from hire_rewrite.rules import count
from hire_rewrite.sharding.rows import RowSharding
from hire_rewrite.sites.ffn.cost import ffn_reads
from hire_rewrite.sites.ffn.exact import exact_form, observed
from hire_rewrite.sites.ffn.experts import side_by_side
from hire_rewrite.sites.ffn.packing import packed_ffn
from hire_rewrite.sites.ffn.rule import FFN
from hire_rewrite.sites.ffn.statistics import TOKENS, FFNStatistics, ffn_statistics
from hire_rewrite.sites.kind import Functions, MatchedSite
from hire_rewrite.sites.layout import from_tokens, to_tokens
from hire_rewrite.sites.operation import Operation, SiteCalibration, reporting
from hire_rewrite.sites.replacement import SiteReplacement
from hire_rewrite.sites.weight_rows import WeightRows


class FFNOperation(Operation):
    """A block on its top k neurons."""

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
        self._rule, self._match = rule, site.match
        self._statistics, self._functions = statistics, functions
        self.undecided = (
            'k="auto" is found by calibration: pack(..., calibration=batches)'
            if undecided
            else None
        )
        self.unit, self.k, self.candidates = spec.group, spec.k_groups, spec.candidate_groups
        self.fixed_units = max(1, spec.common_groups)
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
        return self._rule.k == "auto" or bool(self._rule.common) or super().needs_calibration

    @property
    def calibrated_tokens(self) -> tuple[int, ...]:
        return TOKENS if self._statistics is not None and self._statistics.union else ()

    def describe(self) -> str:
        spec, predictor = self.spec, self.rule.predictor
        k, candidates = spec.k_groups * spec.group, spec.candidate_groups * spec.group
        hint = " (calibrate it in pack)" if predictor.wants_calibration else ""
        return (
            f"top {k} of {candidates} candidates of {spec.width}, in groups of {spec.group}, "
            f"guessed by {predictor}{hint}{self.site.sharding.describe()}"
        )

    def reads(self, tokens: int) -> list[Read]:
        return ffn_reads(
            self.site, self.spec, self.rule.predictor, tokens, self._statistics, self.budget
        )

    def pack(
        self,
        weights: WeightRows,
        calibration: SiteCalibration | None,
        advance: Callable[[], None],
    ) -> FFNState:
        return packed_ffn(self.site, self._rule, self.spec, weights, calibration, advance)

    def rows(self, arrays: FFNState) -> Sequence[Any]:
        return arrays.up, arrays.down

    def partition_specs(self, arrays: Any) -> Any:
        assert isinstance(self.site.sharding, RowSharding)
        return ffn_specs(arrays, self.spec, self.rule.predictor, self.site.sharding)

    def rewritten(self, arrays: Any) -> list[SiteReplacement]:
        settings: dict[str, Any] = {"predictor": self.rule.predictor, "budget": self.budget}
        block: Callable[..., Any] = functools.partial(ops.hire_ffn, **settings)
        if isinstance(self.site.sharding, RowSharding):
            block = functools.partial(
                sharded_ffn,
                sharding=self.site.sharding,
                together=bool(self._match.region.sides),
                **settings,
            )
        return self._replacements(block, arrays, ("rewritten", self.budget, self.site.sharding))

    def exact(self, arrays: Any) -> list[SiteReplacement]:
        return self._replacements(ops.exact_ffn, arrays, ("exact",))

    def dense(self, arrays: Any) -> list[SiteReplacement]:
        return self._replacements(ops.dense_ffn, arrays, ("dense",))

    def measured(self, arrays: Any, *, follow_exact: bool) -> list[SiteReplacement]:
        block = reporting(measured_ffn, follow_exact, predictor=self.rule.predictor)
        return self._replacements(block, arrays, ("measured", follow_exact), reports=True)

    def exact_form(self) -> SiteReplacement:
        return exact_form(self.site, self.spec)

    def observed(self) -> SiteReplacement:
        return observed(self.site, self.spec, shares=self.undecided is not None)

    def statistics(self, calibration: SiteCalibration) -> FFNStatistics:
        undecided = self.undecided is not None
        return ffn_statistics(calibration[1], self.spec, self._rule, undecided=undecided)

    def with_candidates(self, candidates: int) -> FFNOperation:
        groups = -(-candidates // self.spec.num_shards) * self.spec.num_shards
        rule = self._rule.replace(k=self.k * self.unit, candidates=groups * self.unit)
        spec = dataclasses.replace(self.spec, candidate_groups=groups)
        return FFNOperation(self.site, rule, spec, None, False, self._functions)

    def tuned_rule(self) -> FFN:
        if self.undecided is not None:
            return self._rule
        k, candidates = (units * self.unit for units in (self.k, self.candidates))
        return self._rule.replace(k=k, candidates=candidates, group=self.unit)

    def predictors(self, ranks: Sequence[int]) -> list[Predictor]:
        quarter = [Quantized(4)] if self.site.d_model % 32 == 0 else []
        return [*map(LowRank, ranks), Quantized(), *quarter]

    def probe_predictor(self) -> Predictor:
        return LowRank()

    def _replacements(
        self, block: Callable[..., Any], arrays: Any, key: Hashable, *, reports: bool = False
    ) -> list[SiteReplacement]:
        """The replacement of the block, and that of what shares a product with it.

        Args:
          block: (x: [tokens, d], arrays, layer, spec, activation) to [tokens, d_out], or that and
            a report.
          key: what tells it from other blocks.
        """
        block = functools.partial(block, spec=self.spec)
        replacements = [self.replacement(self._run(block, key, reports), arrays, reports=reports)]
        if self._match.shared:
            replacements.append(self._fused(arrays))
        return replacements

    def _run(
        self, block: Callable[..., Any], key: Hashable, reports: bool
    ) -> Callable[[Sequence[Any], Any, Any], Any]:
        match, region, spec = self._match, self._match.region, self.spec
        side_inputs = len(region.sides)
        key = (region.signature, match.piece.axis, spec, self.rule.predictor, key)

        def activated(x: Any, arrays: Any, layer: Any, activation: Activation) -> Any:
            return block(x, arrays, layer, activation=activation)

        if match.experts > 1:
            return side_by_side(match, activated, self._functions, key, reports=reports)

        def hire_ffn(x: Any, ins: Sequence[Any], arrays: Any, layer: Any) -> Any:
            known = dict(zip(region.sides, ins[:side_inputs], strict=True))
            joined = [to_tokens(other, (match.piece.axis,)) for other in ins[side_inputs:]]
            y = activated(x, arrays, layer, lambda pre, vectors: region.run(pre, vectors, known))
            y, report = y if reports else (y, None)
            return add_joined(y, joined, arrays, layer, spec=spec), report

        jitted = self._functions.setdefault(key, jax.jit(hire_ffn))

        def run(ins: Sequence[Any], layer: Any, arrays: Any) -> Any:
            x, *rest = ins
            y, report = jitted(to_tokens(x, match.x_axes), rest, arrays, layer)
            results = [from_tokens(y, match.down.out.shape, match.down.out_axes)]
            return (results, report) if reports else results

        return run

    def _fused(self, arrays: Any) -> SiteReplacement:
        """The other parts of a fused product, from rows of their own."""
        match, siblings = self._match, self._match.region.siblings
        sides = tuple(dict.fromkeys(side for sibling in siblings for side in sibling.sides))

        def run(ins: Sequence[Any], layer: Any, arrays: Any) -> Sequence[Any]:
            x, *side_inputs = ins
            tokens = to_tokens(x, match.x_axes)
            known = dict(zip(sides, side_inputs, strict=True))
            results = []
            for sibling, part in zip(siblings, arrays.fused, strict=True):
                pre, vectors = sibling_inputs(tokens, part, layer, spec=self.spec)
                result = sibling.run(pre, vectors, known)
                results.append(from_tokens(result, sibling.value.shape, (sibling.axis,)))
            return results

        return SiteReplacement(
            f"{self.site.name} (fused)",
            match.shared,
            (match.x, *sides),
            tuple(sibling.value for sibling in siblings),
            run,
            arrays,
            self.site.sharding.region,
            self.site.loops,
        )
