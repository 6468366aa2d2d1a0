"""Products with all rows of one layer that are stored in blocks, streamed from HBM.

Integers are multiplied as they are, block by block, and scales come afterwards: to multiply each
number by its block's scale would move scales across lanes. A matrix unit has room for many tokens,
and blocks take their places: in a span of columns there are as many products as blocks, of which
each has x in its own columns and 0 in the others.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hire_rewrite.ops.kernels.tpu.common import in_hbm, result, step_of, times
from hire_rewrite.ops.kernels.tpu.fits import LANES, span_of


@functools.partial(jax.jit, static_argnames=("bits", "interpret"))
def block_product(
    x: Array,
    steps: Array | None,
    integers: Array,
    scale: Array,
    minimum: Array | float | None,
    layer: Array,
    *,
    bits: int,
    interpret: bool = False,
) -> Array:
    """(x · steps) @ rows[layer].T, with x rounded to bfloat16 and summed in float32.

    Args:
      x: [tokens, d].
      steps: f32[tokens, B], a factor of x for each block, or None.
      integers: i8[L, n, d] for 8 bits, i8[L, n, d/2] for 4 (see `ops.encodings.block_product`).
      scale: [L, n, B], float16, bfloat16 or float32; B is even for 4 bits, or 1.
      minimum: as `scale`; or one number, for so many scales; or None.
      layer: i32[].

    Returns:
      f32[tokens, n].
    """
    tokens, d = x.shape
    n, width = integers.shape[1:]
    form = _Form(tokens, d, width, scale.shape[2])
    step = step_of(n, width)
    x = x.astype(jnp.bfloat16)
    signed, ratio = minimum is None, 1.0 if minimum is None else minimum
    stored = [scale]
    if jnp.ndim(ratio):
        stored, ratio = [scale, jnp.asarray(minimum)], 1.0
    factors = [_Factors.of(array, layer, step) for array in stored]
    given = [form.masked(x)]
    if steps is not None:
        given.append(form.of_blocks(steps))
    if not signed:
        sums = x.astype(jnp.float32).reshape(tokens, form.blocks, -1).sum(-1)
        sums = sums * ratio
        given.append(form.of_blocks(sums if steps is None else sums * steps))

    def kernel(_: Any, *refs: Any) -> None:
        small, (rows, *stored), scores = refs[: len(given)], refs[len(given) : -1], refs[-1]
        masked, *others = small
        scales, *minima = (f.read(ref) for f, ref in zip(factors, stored, strict=True))
        total = jnp.zeros(scores.shape, jnp.float32)
        if not signed:
            total += (others[-1][...] * (minima or [scales])[0][:, None]).sum(0)
        for half, numbers in enumerate(_numbers(rows[...], bits, signed=signed)):
            for span in range(form.spans):
                columns = numbers[:, span * form.span : (span + 1) * form.span]
                products = times(masked[half, span], columns).reshape(form.each, tokens, step)
                here = form.place(half, span)
                if steps is not None:
                    products = products * others[0][here]
                total += (products * scales[here][:, None]).sum(0)
        scores[...] = total

    whole = [pl.BlockSpec(a.shape, lambda i, layer, n=a.ndim: (0,) * n) for a in given]
    moved = integers[0].size + sum(f.array[0].size * f.array.dtype.itemsize for f in factors)
    return pl.pallas_call(
        kernel,
        out_shape=result((tokens, n), integers),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(n, step),),
            in_specs=[
                *whole,
                pl.BlockSpec((None, step, width), lambda i, layer: (layer[0], i, 0)),
                *(f.spec for f in factors),
            ],
            out_specs=pl.BlockSpec((tokens, step), lambda i, layer: (0, i)),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * tokens * n * d * form.each,
            transcendentals=0,
            bytes_accessed=moved + sum(a.size * a.dtype.itemsize for a in given) + tokens * n * 4,
        ),
        name="hire_block_product",
        interpret=interpret,
    )(
        layer.reshape(1),
        *given,
        in_hbm(integers, interpret),
        *(in_hbm(f.array, interpret) for f in factors),
    )


@dataclasses.dataclass(frozen=True)
class _Form:
    """How columns are split: into halves of `width` (of rows of 4 bits), these into spans.

    Attributes:
      stored: how many blocks a row has. One of 4 bits lies in both halves, and counts twice.
    """

    tokens: int
    d: int
    width: int
    stored: int

    @property
    def halves(self) -> int:
        return self.d // self.width

    @property
    def blocks(self) -> int:
        return max(self.stored, self.halves)

    @property
    def span(self) -> int:
        return span_of(self.width, self.d // self.blocks)

    @property
    def spans(self) -> int:
        """Of a half."""
        return self.width // self.span

    @property
    def each(self) -> int:
        """Blocks of a span."""
        return self.blocks // self.halves // self.spans

    def masked(self, x: Array) -> Array:
        """[halves, spans, each · tokens, span] of x: [tokens, d], 0 outside of each block."""
        split = x.reshape(self.tokens, self.halves, self.spans, self.each, -1)
        own = jnp.eye(self.each, dtype=bool)[None, None, :, None, :, None]
        every = jnp.where(own, jnp.moveaxis(split, 0, 2)[:, :, None], 0)
        return every.reshape(self.halves, self.spans, self.each * self.tokens, self.span)

    def of_blocks(self, numbers: Array) -> Array:
        """[blocks, tokens, 1] of [tokens, stored or blocks]."""
        repeated = jnp.repeat(numbers, self.blocks // numbers.shape[1], axis=1)
        return repeated.T[:, :, None]

    def place(self, half: int, span: int) -> slice:
        """Which of the stored factors are those of a span; the only one is everyone's."""
        if self.stored < self.blocks:
            return slice(0, 1)
        first = (half * self.spans + span) * self.each
        return slice(first, first + self.each)


@dataclasses.dataclass(frozen=True)
class _Factors:
    """Scales or minima as a kernel reads them: f32[B, step].

    XLA stores them row by row if that needs no padding, otherwise column by column. Those of
    float16, which the processor does not know, are given as integers: XLA copies one layer's.
    """

    array: Array
    spec: pl.BlockSpec
    by_row: bool
    half: bool

    @staticmethod
    def of(factors: Array, layer: Array, step: int) -> _Factors:
        blocks, half = factors.shape[2], factors.dtype == jnp.float16
        if half:
            here = lax.dynamic_index_in_dim(factors, layer)
            factors = lax.bitcast_convert_type(here, jnp.int16)
        if blocks % LANES == 0:
            place: Any = (lambda i, _: (0, i, 0)) if half else lambda i, layer: (layer[0], i, 0)
            return _Factors(factors, pl.BlockSpec((None, step, blocks), place), True, half)
        place = (lambda i, _: (0, 0, i)) if half else lambda i, layer: (layer[0], 0, i)
        spec = pl.BlockSpec((None, blocks, step), place)
        return _Factors(jnp.swapaxes(factors, 1, 2), spec, False, half)

    def read(self, ref: Any) -> Array:
        stored = ref[...]
        wide = _from_half(stored.astype(jnp.int32)) if self.half else stored.astype(jnp.float32)
        return wide.T if self.by_row else wide


def _from_half(bits: Array) -> Array:
    """f32 of the bits of float16: its exponent is moved, and the greatest is that of infinity. With
    the least one they are an integer, for small numbers of float32 would become 0."""
    magnitude, exponent = (bits & 0x7FFF) << 13, bits & 0x7C00
    value = lax.bitcast_convert_type(magnitude, jnp.float32) * jnp.float32(2.0**112)
    small = (bits & 0x3FF).astype(jnp.float32) * jnp.float32(2.0**-24)
    large = lax.bitcast_convert_type(magnitude | 0x7F800000, jnp.float32)
    value = jnp.where(exponent == 0, small, jnp.where(exponent == 0x7C00, large, value))
    return jnp.where(bits < 0, -value, value)


def _numbers(stored: Array, bits: int, *, signed: bool) -> tuple[Array, ...]:
    """bf16[step, width], the integers of rows, or those of their halves."""
    if bits == 8:
        return (stored.astype(jnp.bfloat16),)
    both = stored.astype(jnp.int32)
    halves = ((both << 28) >> 28, both >> 4) if signed else (both & 15, (both >> 4) & 15)
    return tuple(half.astype(jnp.float32).astype(jnp.bfloat16) for half in halves)
