"""A block from a compressed copy of all its layers, with its top k neurons exactly."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hire_rewrite.graph.weights import narrow
from hire_rewrite.ops.encodings import Blocks, Encoding, Float, Stored, fetched_kind
from hire_rewrite.ops.ffn import tail as ops
from hire_rewrite.ops.ffn.sharded import compared, summed
from hire_rewrite.ops.ffn.tail import PredictedFFNSpec, PredictedFFNState
from hire_rewrite.ops.predictors import Predictor, Read
from hire_rewrite.ops.quality import lengths
from hire_rewrite.rules import count
from hire_rewrite.sites.ffn.divided import DividedBlock
from hire_rewrite.sites.ffn.match import FFNMatch
from hire_rewrite.sites.ffn.packing import BlockRows, device_rows, packed_block
from hire_rewrite.sites.ffn.rule import FFN
from hire_rewrite.sites.kind import Functions, MatchedSite, Unfit, unfit_if_refused
from hire_rewrite.sites.operation import SiteCalibration, counting, reporting, silent
from hire_rewrite.sites.replacement import SiteReplacement
from hire_rewrite.sites.weight_rows import WeightRows


def predicted_operation(
    site: MatchedSite, rule: FFN, functions: Functions
) -> PredictedFFNOperation:
    """The operation that a rule with `tail="predicted"` asks for at a block.

    Raises:
      HireRewriteError: the rule asks for more neurons than there are.
      Unfit: the rule cannot be applied to this block.
    """
    match: FFNMatch = site.match
    if match.activation.keeps is not None:
        raise Unfit(
            "it selects among all of its neurons itself, and those that it zeroes need no guess; "
            'give tail="zero"'
        )
    width, up, down = match.region.size, match.linears[0], match.down
    projections, devices = len(match.region.projections), site.sharding.row_shards
    if width % devices:
        raise Unfit(f"its {width} neurons cannot be divided among {devices} devices")
    own = width // devices
    group = math.gcd(rule.group or 1, own)
    assert not isinstance(rule.k, str)
    k = count(rule.k, width, f"{site.name}: k") if rule.k else 0
    exact = rule.exact or _as_the_model(site) if k else None
    encoding = rule.encoding or Blocks(8)
    with unfit_if_refused():
        encoding.check(projections * own, up.in_dim, site=site.name)
        encoding.check(down.out_dim, own, site=site.name)
        if exact is not None:
            exact.check(projections * own, up.in_dim, site=site.name)
            exact.check(own, down.out_dim, site=site.name)
    spec = PredictedFFNSpec(
        up_dtype=up.out.dtype,
        down_dtype=down.out.dtype,
        precision=up.node.params["precision"],
        compute_dtype=up.weight.dtype,
        width=width,
        group=group,
        projections=projections,
        k_groups=-(-k // (group * devices)) * devices,
        criterion=rule.criterion or "output",
        encoding=encoding,
        exact=exact,
        round_inputs=rule.round_inputs,
    )
    return PredictedFFNOperation(site, rule, spec, functions)


def _as_the_model(site: MatchedSite) -> Float:
    """The encoding that holds the rows of a block as the model has them."""
    if any(linear.out.dtype == jnp.float64 for linear in site.linears):
        raise Unfit(
            "it computes in float64, and stored numbers are multiplied in float32; for fewer bits "
            'give exact=Float("float32")'
        )
    dtypes = {jnp.dtype(narrow(linear.weight).dtype) for linear in site.linears}
    return Float("bfloat16" if dtypes == {jnp.dtype("bfloat16")} else "float32")


class PredictedFFNOperation(DividedBlock):
    """A block of which each token has its top k neurons exactly, and the others guessed."""

    spec: PredictedFFNSpec
    device_spec: PredictedFFNSpec

    def __init__(
        self, site: MatchedSite, rule: FFN, spec: PredictedFFNSpec, functions: Functions
    ) -> None:
        super().__init__(site, rule, spec, functions)
        self.device_spec = spec.of_devices(site.sharding.row_shards)
        self.unit, self.k, self.candidates = spec.group, spec.k_groups, spec.k_groups

    @property
    def layout(self) -> Hashable:
        spec = self.spec
        by_output = spec.criterion == "output"
        return (
            "ffn",
            "predicted",
            spec.width,
            spec.projections,
            spec.encoding,
            spec.exact,
            by_output,
            self.site.sharding.num_shards,
            self.site.sharding.row_shards,
        )

    @property
    def scored(self) -> tuple[int, int]:
        return self.spec.projections * self.device_spec.width, self.site.d_model

    @property
    def predictor(self) -> Predictor | None:
        return None

    def describe(self) -> str:
        spec, rule, where = self.spec, self.rule, self.site.sharding.describe()
        rounded = ", inputs rounded to 8 bits" if rule.round_inputs else ""
        if not spec.k_groups:
            return f"all of {spec.width} neurons as {spec.encoding}{rounded}{where}"
        exactly = "exactly" if rule.exact is None else f"as {rule.exact}"
        groups = f", in groups of {spec.group}" if spec.group > 1 else ""
        return (
            f"top {self.k * self.unit} of {spec.width} neurons {exactly}{groups}, the others as "
            f"{spec.encoding}{rounded}{where}"
        )

    def reads(self, tokens: int) -> list[Read]:
        """The copy, and the exact rows of each token, which are counted as if they shared none."""
        spec, d_in, d_out = self.device_spec, self.site.d_model, self._match.down.out_dim
        width, projections, shared = spec.width, spec.projections, self._shared_reads(tokens)
        copy = (
            *spec.encoding.reads(projections * width, d_in, tokens),
            *spec.encoding.reads(d_out, width, tokens),
        )
        if spec.exact is None:
            return [*copy, *shared]
        if spec.takes_all(tokens):
            first = spec.exact.reads(projections * width, d_in, tokens)
            return [*first, *spec.exact.reads(width, d_out, tokens), *shared]
        pieces = tokens * spec.k_groups
        neurons = pieces * spec.group
        kind = fetched_kind(spec.exact)
        size = spec.exact.bytes(neurons * projections, d_in) + spec.exact.bytes(neurons, d_out)
        scores = tokens * spec.groups
        return [*copy, Read(kind, size, pieces=2 * pieces, scores=scores), *shared]

    def pack(
        self,
        weights: WeightRows,
        calibration: SiteCalibration | None,
        advance: Callable[[], None],
    ) -> PredictedFFNState:
        arrays: PredictedFFNState = packed_block(self.site, weights, self.encodings, self._state)
        return arrays

    def _state(
        self, own: BlockRows, store: Callable[[Encoding, jax.Array], Stored]
    ) -> PredictedFFNState:
        """The arrays for the rows of one device; `store` says what is stored of a matrix."""
        spec, (layers, _, _, d_in) = self.spec, own.up.shape
        by_neuron = jnp.swapaxes(own.up, 1, 2).reshape(layers, -1, d_in)
        by_output = spec.criterion == "output"
        return PredictedFFNState(
            up=store(spec.encoding, own.up.reshape(layers, -1, d_in)),
            down=store(spec.encoding, jnp.swapaxes(own.down, 1, 2)),
            exact_up={} if spec.exact is None else store(spec.exact, by_neuron),
            exact_down={} if spec.exact is None else store(spec.exact, own.down),
            vectors=own.vectors,
            norms=lengths(own.down) if by_output else None,
        )

    @property
    def encodings(self) -> dict[str, Encoding]:
        copy, exact = self.spec.encoding, self.spec.exact
        rows = {"up": copy, "down": copy}
        return rows if exact is None else {**rows, "exact_up": exact, "exact_down": exact}

    @property
    def holds_weights(self) -> bool:
        """Where the rows for the top k are all there as the model has them."""
        return self.spec.exact is not None and self.rule.exact is None

    def with_weights(self, arrays: PredictedFFNState, weights: WeightRows) -> PredictedFFNState:
        rows = device_rows(self.site, weights)
        up = rows.up.reshape(rows.up.shape[0], -1, rows.up.shape[-1])
        return arrays._replace(dense=(up, rows.down))

    def rows(self, arrays: PredictedFFNState) -> Sequence[Any]:
        return arrays.up, arrays.down, arrays.exact_up, arrays.exact_down

    def rewritten(self, arrays: Any) -> list[SiteReplacement]:
        block = summed(silent(ops.hire_predicted_ffn), self.row_axes)
        return self._replacements(block, arrays, ("rewritten",))

    def counted(self, arrays: Any) -> list[SiteReplacement]:
        block = summed(counting(ops.counted_predicted_ffn), self.row_axes)
        return self._replacements(block, arrays, ("counted",), reports=True, by_device=True)

    @property
    def counted_units(self) -> int:
        return self.device_spec.groups

    def exact(self, arrays: Any) -> list[SiteReplacement]:
        block = summed(silent(ops.dense_predicted_ffn), self.row_axes)
        return self._replacements(block, arrays, ("dense",))

    dense = exact

    def measured(self, arrays: Any, *, follow_exact: bool) -> list[SiteReplacement]:
        measured = compared(ops.measured_predicted_ffn, self.row_axes)
        block = reporting(measured, follow_exact)
        return self._replacements(block, arrays, ("measured", follow_exact), reports=True)

    def with_candidates(self, candidates: int) -> PredictedFFNOperation:
        """The same with so many groups exactly, rounded up to as many of each device."""
        devices = self.site.sharding.row_shards
        candidates = -(-candidates // devices) * devices
        spec = dataclasses.replace(self.spec, k_groups=candidates)
        rule = self.rule.replace(k=candidates * self.unit)
        return PredictedFFNOperation(self.site, rule, spec, self._functions)

    def tuned_rule(self) -> FFN:
        encoding: Encoding = self.spec.encoding
        return self.rule.replace(k=self.k * self.unit, group=self.unit, encoding=encoding)
