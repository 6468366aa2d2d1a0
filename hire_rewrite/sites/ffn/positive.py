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
from jax.sharding import PartitionSpec

from hire_rewrite.cost.machine import fetches_words
from hire_rewrite.errors import HireRewriteError
from hire_rewrite.graph.weights import narrow
from hire_rewrite.ops.certify import rounding
from hire_rewrite.ops.encodings import (
    Encoding,
    Float,
    Stored,
    Words,
    fetched_kind,
    in_words,
    narrowest,
)
from hire_rewrite.ops.ffn import positive as ops
from hire_rewrite.ops.ffn.positive import PositiveFFNSpec, PositiveFFNState
from hire_rewrite.ops.ffn.sharded import compared, summed
from hire_rewrite.ops.kernels.tpu.fits import fits_picked
from hire_rewrite.ops.predictors import Predictor, Quantized, Read, certifies, reads_of
from hire_rewrite.rules import count
from hire_rewrite.sites.ffn.block import BlockOperation
from hire_rewrite.sites.ffn.exact import Positives, RawBlock
from hire_rewrite.sites.ffn.match import FFNMatch
from hire_rewrite.sites.ffn.packing import BlockRows, device_rows, encoded_block, packed_block
from hire_rewrite.sites.ffn.rule import FFN
from hire_rewrite.sites.kind import Functions, MatchedSite, StaysDense, Unfit
from hire_rewrite.sites.operation import SiteCalibration, counting, reporting, silent
from hire_rewrite.sites.replacement import SiteReplacement
from hire_rewrite.sites.weight_rows import WeightRows, fit_predictor, map_layers

_BEST = Quantized()
SHARE = 0.5
"""Of neurons that are taken to be positive where nobody has looked: of weights that are symmetric
around zero half are."""


@dataclasses.dataclass(frozen=True)
class PositiveStatistics:
    """What packing found out about a block.

    Attributes:
      up, down: the narrowest encodings that hold the rows of the first matrices and of the second;
        None where nobody has looked.
      share: of neurons that are not zero, in the layer that has most; None without calibration.
      most: the greatest such share of one token.
    """

    up: Encoding | None = None
    down: Encoding | None = None
    share: float | None = None
    most: float | None = None


def positive_operation(
    site: MatchedSite, rule: FFN, told: PositiveStatistics | None, functions: Functions
) -> PositiveOperation:
    """The operation that a rule with `k="positive"` asks for at a block.

    Raises:
      HireRewriteError: the rule asks for more neurons than there are.
      Unfit: the rule cannot be applied to this block.
    """
    match: FFNMatch = site.match
    told = told or PositiveStatistics()
    gates = match.activation.zeroing
    if not gates:
        raise Unfit(
            f"its activation ({match.activation.name}) is not seen to make a neuron zero, and "
            'k="positive" leaves out those that are; give a number or share'
        )
    devices = site.sharding.row_shards
    if match.region.size % devices:
        raise Unfit(f"its {match.region.size} neurons cannot be divided among {devices} devices")
    known = (jnp.dtype("float32"), jnp.dtype("bfloat16"))
    up, down, width = match.linears[0], match.down, match.region.size
    if up.out.dtype not in known or down.out.dtype not in known:
        raise Unfit(f'k="positive" is for products in float32 and bfloat16, not {up.out.dtype}')
    d, projections = up.in_dim, len(match.region.projections)
    first, second = rule.exact or told.up, rule.exact or told.down
    if first is None or second is None:
        first, second = _apart(site, _as_the_model(up), _as_the_model(down))
    predictor = rule.predictor or _guess(first, len(gates) * width, d, told, up)
    if predictor is not None and not certifies(predictor):
        raise Unfit(
            f'{predictor} has no bound of its errors, by which k="positive" chooses; give '
            "predictor=Quantized()"
        )
    try:
        first.check(projections * width // devices, d, site=site.name)
        second.check(width // devices, down.out_dim, site=site.name)
        if predictor is not None:
            predictor.check(len(gates) * width // devices, d, site=site.name)
    except HireRewriteError as error:
        raise Unfit(str(error)) from None
    spec = PositiveFFNSpec(
        up_dtype=up.out.dtype,
        down_dtype=down.out.dtype,
        precision=up.node.params["precision"],
        compute_dtype=up.weight.dtype,
        width=width,
        d_out=down.out_dim,
        projections=projections,
        gates=gates,
        budget=width,
        up=first,
        down=second,
        predictor=predictor,  # type: ignore[arg-type]
        margin=rule.margin,
    )
    read = _read_share(spec, d, told.share)
    if match.experts == 1:
        most = 0.5 if told.most is None else 1.5 * (told.most + read - (told.share or 0.0))
        budget = width if most >= 1 else math.ceil(most * width)
        if rule.budget is not None:
            budget = count(rule.budget, width, f"{site.name}: budget")
        spec = dataclasses.replace(spec, budget=budget)
    return PositiveOperation(site, rule, spec, told, functions)


def _as_the_model(linear: Any) -> Float:
    dtypes = {jnp.dtype(narrow(linear.weight).dtype), jnp.dtype(linear.weight.dtype)}
    return Float("bfloat16" if jnp.dtype("bfloat16") in dtypes else "float32")


def _apart(site: MatchedSite, up: Encoding, down: Encoding) -> tuple[Encoding, Encoding]:
    """The encodings of both layers' rows, so that the machine can fetch each row alone."""
    if site.sharding.mesh is not None or not fetches_words():
        return up, down
    return in_words(up, site.d_model), in_words(down, site.match.down.out_dim)


def _guess(rows: Encoding, n: int, d: int, told: PositiveStatistics, up: Any) -> Predictor | None:
    """A guess of the gates where calibration tells that it saves bytes; None to read them whole."""
    if told.share is None:
        return None
    guess = _BEST.bytes(n, d, narrow(up.weight).dtype)
    share = min(1.0, told.share + _spread(_BEST, "proved", d))
    whole = rows.bytes(n, d)
    return _BEST if guess + share * whole < whole else None


def _spread(predictor: Predictor, margin: float | str, d: int) -> float:
    """The share of neurons of which a guess does not tell that they are zero: an estimate.

    Of numbers that are spread like normal ones 0.4 of them lie within a standard deviation around
    the middle; rows of 8 bits are off by about 0.7 % of it, of 4 bits by 8 %.
    """
    error = 0.08 if getattr(predictor, "bits", 8) == 4 else 0.007
    deviations = math.sqrt(d) if margin == "proved" else float(margin)
    return 0.4 * error * deviations


def _read_share(spec: PositiveFFNSpec, d: int, share: float | None) -> float:
    """Of neurons that are read one by one."""
    share = SHARE if share is None else share
    if spec.predictor is not None:
        share += _spread(spec.predictor, spec.margin, d)
    return min(1.0, share)


class PositiveOperation(BlockOperation):
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
        self._share = _read_share(spec, site.d_model, told.share)

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
        if not all(bool(jnp.isfinite(some).all()) for some in (up, rows.down)):
            return StaysDense("its weights hold a NaN or an infinity, which a zero does not undo")
        first, second = (
            narrowest(np.asarray(some)) if some.is_fully_addressable else None
            for some in (up, rows.down)
        )
        stored_up, stored_down = _apart(
            self.site,
            _as_the_model(match.linears[0]) if first is None else first[0],
            _as_the_model(match.down) if second is None else second[0],
        )
        return dataclasses.replace(self._told, up=stored_up, down=stored_down)

    def pack(
        self,
        weights: WeightRows,
        calibration: SiteCalibration | None,
        advance: Callable[[], None],
    ) -> PositiveFFNState:
        arrays: PositiveFFNState = packed_block(
            self.site, weights, self._encodings, functools.partial(self._state, advance)
        )
        return arrays

    def encoded(self, arrays: PositiveFFNState) -> PositiveFFNState:
        if self.site.sharding.region is None:
            return arrays
        encoded: PositiveFFNState = encoded_block(self.site, self._encodings, arrays)
        return encoded

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
            bound = map_layers(spec.predictor.fit_bound, rows.astype(spec.compute_dtype), guess)
        return PositiveFFNState(
            gates={} if spec.predictor is not None else store(spec.whole, rows),
            up=store(spec.up, picked) if spec.picked else {},
            down=store(spec.down, own.down),
            vectors=own.vectors,
            predictor=guess,
            bound=bound,
            norms=rounding.norms(own.up.astype(spec.compute_dtype)),
        )

    @property
    def _encodings(self) -> dict[str, Encoding]:
        spec = self.spec
        return {"gates": spec.whole, "up": spec.up, "down": spec.down}

    def partition_specs(self, arrays: Any) -> Any:
        return jax.tree.map(lambda _: PartitionSpec(self.site.sharding.axes), arrays)

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
        block = summed(silent(ops.positive_ffn), self._row_axes)
        return self._replacements(block, arrays, ("rewritten",))

    def counted(self, arrays: Any) -> list[SiteReplacement]:
        block = summed(counting(ops.counted_positive_ffn), self._row_axes)
        return self._replacements(block, arrays, ("counted",), reports=True, by_device=True)

    @property
    def counted_units(self) -> int:
        return self.device_spec.width

    def exact(self, arrays: Any) -> list[SiteReplacement]:
        block = summed(silent(ops.dense_positive_ffn), self._row_axes)
        return self._replacements(block, arrays, ("dense",))

    dense = exact

    def measured(self, arrays: Any, *, follow_exact: bool) -> list[SiteReplacement]:
        measured = compared(ops.measured_positive_ffn, self._row_axes)
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
