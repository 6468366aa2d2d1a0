"""A block without the neurons that its activation makes zero."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hire_rewrite.cost.machine import fetches_words
from hire_rewrite.graph.weights import narrow
from hire_rewrite.ops.certify import rounding
from hire_rewrite.ops.encodings import (
    Encoding,
    Float,
    Stored,
    Words,
    fetched_kind,
    narrowest,
)
from hire_rewrite.ops.ffn import positive as ops
from hire_rewrite.ops.ffn.positive import PositiveFFNSpec, PositiveFFNState
from hire_rewrite.ops.ffn.sharded import compared, summed
from hire_rewrite.ops.kernels.tpu.fits import fits_picked
from hire_rewrite.ops.predictors import Predictor, Read, reads_of
from hire_rewrite.sites.ffn.divided import DividedBlock
from hire_rewrite.sites.ffn.exact import Positives, RawBlock
from hire_rewrite.sites.ffn.packing import BlockRows, device_rows, packed_block
from hire_rewrite.sites.ffn.positive_sizes import (
    PositiveStatistics,
    as_the_model,
    positive_spec,
    read_share,
    rows_apart,
)
from hire_rewrite.sites.ffn.rule import FFN
from hire_rewrite.sites.kind import Functions, MatchedSite, StaysDense
from hire_rewrite.sites.operation import SiteCalibration, counting, reporting, silent
from hire_rewrite.sites.replacement import SiteReplacement
from hire_rewrite.sites.weight_rows import WeightRows, all_finite, fit_bounds, fit_predictor


def positive_operation(
    site: MatchedSite, rule: FFN, told: PositiveStatistics | None, functions: Functions
) -> PositiveOperation:
    """The operation that a rule with `k="positive"` asks for at a block.

    Raises:
      HireRewriteError: the rule asks for more neurons than there are.
      Unfit: the rule cannot be applied to this block.
    """
    told = told or PositiveStatistics()
    return PositiveOperation(site, rule, positive_spec(site, rule, told), told, functions)


class PositiveOperation(DividedBlock):
    """A block of which each token has the neurons that may not be zero."""

    spec: PositiveFFNSpec
    device_spec: PositiveFFNSpec
    reads_vary = True

    def __init__(
        self,
        site: MatchedSite,
        rule: FFN,
        spec: PositiveFFNSpec,
        told: PositiveStatistics,
        functions: Functions,
    ) -> None:
        super().__init__(site, rule, spec, functions)
        self.device_spec = spec.of_devices(site.sharding.row_shards)
        self._told = told
        self._share = read_share(spec, site.d_model, told.share)

    @property
    def layout(self) -> Hashable:
        spec = self.spec
        proved = spec.margin == "proved"
        return (
            "ffn", "positive", spec.width, spec.projections, spec.gates, spec.up, spec.down,
            spec.predictor, proved, self.site.sharding.num_shards, self.site.sharding.row_shards,
        )  # fmt: skip

    @property
    def scored(self) -> tuple[int, int]:
        return len(self.spec.gates) * self.device_spec.width, self.site.d_model

    @property
    def predictor(self) -> Predictor | None:
        return self.spec.predictor

    @property
    def learns(self) -> bool:
        return True

    @property
    def examines(self) -> bool:
        return self.rule.exact is None and self._told.up is None

    @property
    def needs_calibration(self) -> bool:
        return False

    def describe(self) -> str:
        spec, share = self.spec, self._told.share
        seen = "" if share is None else f" ({100 * share:.0f} % in calibration)"
        if spec.predictor is None:
            how = "told by the first product"
        elif spec.margin == "proved":
            how = f"proved from {spec.predictor}"
        else:
            how = f"guessed by {spec.predictor} within {spec.margin} standard deviations"
        rows = spec.whole
        stored = "" if isinstance(rows, Float) else f", rows as {rows}"
        where = self.site.sharding.describe()
        return f"the neurons of {spec.width} that are not zero{seen}, {how}{stored}{where}"

    def reads(self, tokens: int) -> list[Read]:
        """Rows of several tokens are counted as if they shared none.

        A list is read to its end, but on TPU only by kernels: what they do not take is a gather of
        the whole budget.
        """
        d, share, spec = self.site.d_model, self._share, self.device_spec
        reads, each = self._shared_reads(tokens), math.ceil(share * spec.width)
        if fetches_words() and not self._fits(spec, tokens):
            each = spec.budget
        picked = tokens * each
        if share * spec.width > spec.budget:  # then all are read, in one piece
            rows = spec.width * len(spec.picked)
            reads += [
                *spec.up.reads(rows, d, tokens),
                *spec.down.reads(spec.width, spec.d_out, tokens),
            ]
        else:
            reads += _fetched(spec.up, picked * len(spec.picked), d)
            reads += _fetched(spec.down, picked, spec.d_out)
        if spec.predictor is None:
            return [*reads, *spec.up.reads(len(spec.gates) * spec.width, d, tokens)]
        dtype = narrow(self._match.linears[0].weight).dtype
        return [*reads, *reads_of(spec.predictor, len(spec.gates) * spec.width, d, dtype, tokens)]

    def _fits(self, spec: PositiveFFNSpec, tokens: int) -> bool:
        """Whether the kernels for TPU take a device's lists of rows."""
        every = [(spec.up, self.site.d_model, len(spec.picked)), (spec.down, spec.d_out, 1)]
        return all(
            _kernels_fit(rows, d, (tokens, spec.budget * several))
            for rows, d, several in every
            if several
        )

    def examine(self, weights: WeightRows) -> PositiveStatistics | StaysDense:
        match, rows = self._match, device_rows(self.site, weights)
        up = rows.up.reshape(rows.up.shape[0], -1, rows.up.shape[-1])
        if not bool(all_finite((up, rows.down))):
            return StaysDense("its weights hold a NaN or an infinity, which a zero does not undo")
        first, second = (
            narrowest(np.asarray(some)) if some.is_fully_addressable else None
            for some in (up, rows.down)
        )
        stored_up, stored_down = rows_apart(
            self.site,
            as_the_model(match.linears[0]) if first is None else first[0],
            as_the_model(match.down) if second is None else second[0],
        )
        return dataclasses.replace(self._told, up=stored_up, down=stored_down)

    def pack(
        self,
        weights: WeightRows,
        calibration: SiteCalibration | None,
        advance: Callable[[], None],
    ) -> PositiveFFNState:
        arrays: PositiveFFNState = packed_block(
            self.site, weights, self.encodings, functools.partial(self._state, advance)
        )
        return arrays

    def _state(
        self,
        advance: Callable[[], None],
        own: BlockRows,
        store: Callable[[Encoding, jax.Array], Stored],
    ) -> PositiveFFNState:
        """The arrays for the rows of one device; `store` says what is stored of a matrix."""
        spec, (layers, _, _, d_in) = self.device_spec, own.up.shape
        rows = own.up[:, spec.gates, :, :].reshape(layers, -1, d_in)
        picked = jnp.swapaxes(own.up[:, spec.picked, :, :], 1, 2).reshape(layers, -1, d_in)
        guess: Any = {}
        bound: Any = {}
        if spec.predictor is not None:
            guess = fit_predictor(spec.predictor, rows, None, advance)
            bound = fit_bounds(spec.predictor, rows.astype(spec.compute_dtype), guess)
        return PositiveFFNState(
            gates={} if spec.predictor is not None else store(spec.whole, rows),
            up=store(spec.up, picked) if spec.picked else {},
            down=store(spec.down, own.down),
            vectors=own.vectors,
            predictor=guess,
            bound=bound,
            norms=_norms(own.up.astype(spec.compute_dtype)),
        )

    @property
    def encodings(self) -> dict[str, Encoding]:
        spec = self.spec
        return {"gates": spec.whole, "up": spec.up, "down": spec.down}

    def rows(self, arrays: PositiveFFNState) -> Sequence[Any]:
        return arrays.gates, arrays.up, arrays.down, arrays.predictor

    @property
    def holds_weights(self) -> bool:
        return self.rule.exact is None

    @property
    def keeps_gradient(self) -> bool:
        # Another activation may pass through zero at a point, with a slope.
        lossless = self.rule.exact is None and self.spec.margin == "proved"
        return lossless and self._match.activation.sparse

    def rewritten(self, arrays: Any) -> list[SiteReplacement]:
        block = summed(silent(ops.positive_ffn), self.row_axes)
        return self._replacements(block, arrays, ("rewritten",))

    def counted(self, arrays: Any) -> list[SiteReplacement]:
        block = summed(counting(ops.counted_positive_ffn), self.row_axes)
        return self._replacements(block, arrays, ("counted",), reports=True, by_device=True)

    @property
    def counted_units(self) -> int:
        return self.device_spec.width

    def exact(self, arrays: Any) -> list[SiteReplacement]:
        block = summed(silent(ops.dense_positive_ffn), self.row_axes)
        return self._replacements(block, arrays, ("dense",))

    dense = exact

    def measured(self, arrays: Any, *, follow_exact: bool) -> list[SiteReplacement]:
        measured = compared(ops.measured_positive_ffn, self.row_axes)
        block = reporting(measured, follow_exact)
        return self._replacements(block, arrays, ("measured", follow_exact), reports=True)

    def observed(self) -> SiteReplacement:
        block = RawBlock(self._match)

        def run(ins: Sequence[Any], *_: Any) -> Any:
            return block.positive(ins)

        return dataclasses.replace(self.replacement(run, None, reports=True), inputs=block.inputs)

    def statistics(self, calibration: SiteCalibration) -> PositiveStatistics:
        seen: Positives = jax.tree.map(np.asarray, calibration[1])
        (bins,) = np.nonzero(seen.bins.sum(0))
        return dataclasses.replace(
            self._told,
            share=float((seen.share / np.maximum(seen.tokens, 1)).max()),
            most=float((bins.max(initial=0) + 1) / seen.bins.shape[1]),
        )


_norms = jax.jit(rounding.norms)


def _fetched(encoding: Encoding, rows: int, d: int) -> list[Read]:
    if not rows:
        return []
    return [Read(fetched_kind(encoding), encoding.bytes(rows, d), pieces=rows)]


def _kernels_fit(encoding: Encoding, d: int, lists: tuple[int, int]) -> bool:
    """Whether the kernels for TPU take so many tokens' lists of so many rows of length d."""
    if not isinstance(encoding, Float | Words):
        return False
    shape: Any = jax.ShapeDtypeStruct
    (row,) = jax.tree.leaves(jax.eval_shape(encoding.store, shape((1, d), jnp.float32)))
    x, picked = shape((lists[0], d), jnp.float32), shape(lists, jnp.int32)
    return fits_picked(x, shape((1, *row.shape), row.dtype), picked)
