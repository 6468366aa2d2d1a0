"""Proofs that the greatest values of a head are those that the dense head would have found.

Every value of the dense head, in whatever order it adds, is enclosed between two numbers. If the
lower end of one value is above the upper ends of all others, it is the greatest, and nothing about
it depends on rounding. `docs/certify.md` derives the ends.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from hire_rewrite import _compat
from hire_rewrite.errors import HireRewriteError
from hire_rewrite.ops.certify import rounding
from hire_rewrite.ops.certify.dense import dense_error
from hire_rewrite.ops.certify.monotone import Chain, examine
from hire_rewrite.ops.head.spec import Endpoints, HeadSpec, HeadState, best
from hire_rewrite.ops.predictors import Certifying
from hire_rewrite.ops.top_k.select import scatter

__all__ = ["chain_of", "enclose", "ordered", "proved", "widen"]

_RANKED_SLACK = 4
"""Roundings, at most, on the way to what ranks the values: a softmax, its logarithm, a cast."""

_RAW_SLACK, _SLACK, _NARROW_SLACK = 4, 16, 4
"""How far code behind the logits may be from monotone, in units of its rounding: as if its argument
or its result were off by so much. Elementary functions in float32 are off by a few units; in
narrower types they are computed in float32 and rounded."""


def proved(
    x: Array,
    scores: Array,
    positive: Array,
    negative: Array,
    results: tuple[Array, ...],
    state: HeadState,
    layer: Array | int,
    rows: Array,
    places: list[Array],
    *,
    spec: HeadSpec,
    endpoints: Endpoints,
    predictor: Certifying,
    roundings: int,
) -> Array:
    """bool[tokens], whether the greatest of `results` are the dense head's.

    Args:
      positive, negative: f32[tokens, c], the sums of the terms of either sign of the candidates'
        products, with so many `roundings`.
      rows, places: see `candidates_of`.
    """
    chain = chain_of(endpoints, x.shape[0], spec)
    norm = lax.dynamic_index_in_dim(state.bound["norm"], layer)
    length, arrays = rounding.norms(x)[:, None], state.guessing(predictor)
    both = jnp.promote_types(x.dtype, spec.compute_dtype)
    dense = dense_error(x.shape[1], both, spec.precision, length, norm)
    guessed = predictor.bound(arrays, state.bound, x, layer) + dense.below(length, norm)
    units = rounding.CPU_UNIT, rounding.OTHER_UNIT
    share = rounding.platform(*(rounding.gamma(roundings + 2, unit) for unit in units))
    summed = share * (positive + negative)
    tiny = jnp.take_along_axis(dense.tiny, rows, axis=-1, mode="promise_in_bounds")
    summed += dense._replace(tiny=tiny).of(*map(rounding.at_least, (positive, negative)))
    first, second = (
        endpoints(scatter(guess, rows, exact))
        for guess, exact in zip(
            enclose(scores, guessed, spec, chain),
            enclose(positive - negative, summed, spec, chain),
            strict=True,
        )
    )
    sure = jnp.ones(x.shape[0], bool)
    for low, high, values, place in zip(first, second, results, places, strict=True):
        exact = jnp.take_along_axis(values, place, axis=-1, mode="promise_in_bounds")
        order = best(exact, min(spec.certify, place.shape[-1]))[1]
        ranked = jnp.take_along_axis(place, order, axis=-1, mode="promise_in_bounds")
        sure &= ordered(*widen(low, high, chain), ranked, spec.rounding)
    return sure


def chain_of(endpoints: Endpoints, tokens: int, spec: HeadSpec) -> Chain:
    """What is known about the code behind the logits.

    Raises:
      HireRewriteError: it may not be monotone in each logit.
    """
    chain = examine(endpoints, (tokens, spec.width), spec.out_dtype)
    if chain.obstacle is not None:
        raise HireRewriteError(
            f"certify: {chain.obstacle}, so that a bound of a logit says nothing about what comes "
            "of it: leave certify out for this head"
        )
    return chain


def enclose(middle: Array, error: Array, spec: HeadSpec, chain: Chain) -> tuple[Array, Array]:
    """Logits between which those of the dense head are, in the dtype of its product.

    Args:
      middle: f32[...].
      error: f32[...], how far the dense head's are from it before they are rounded to that dtype.
    """
    # The term of `middle` is for the rounding of the sums below.
    error = rounding.at_least(error + 2.0**-23 * jnp.abs(middle))
    if spec.cast:
        here = rounding.BFLOAT16_UNIT if _compat.rounds_casts() else 0.0
        cast = 2 * rounding.platform(here, rounding.BFLOAT16_UNIT)
        error = rounding.at_least(error + cast * (jnp.abs(middle) + error))
    ends = []
    narrow = jnp.dtype(spec.out_dtype) != jnp.float32
    for end, sign in ((middle - error, -1.0), (middle + error, 1.0)):
        if not chain.plain:
            # Compilers may leave out roundings between operations: then both have to be inside.
            unit = float(jnp.finfo(spec.out_dtype).eps) if narrow else 0.0
            end = end + sign * (_RAW_SLACK * chain.unit + unit) * jnp.abs(end)
        if narrow:
            kind = jnp.finfo(spec.out_dtype)
            # A cast to and fro might be left out by the compiler, this is not.
            end = lax.reduce_precision(end, kind.bits - 1 - kind.nmant, kind.nmant)
        ends.append(end.astype(spec.out_dtype))
    return ends[0], ends[1]


def widen(first: Array, second: Array, chain: Chain) -> tuple[Array, Array]:
    """f32 ends of values, from what the model's code made of both ends of the logits."""
    kind = jnp.finfo(first.dtype)
    first, second = (
        lax.reduce_precision(value, kind.bits - 1 - kind.nmant, kind.nmant).astype(jnp.float32)
        for value in (first, second)
    )
    low, high = jnp.minimum(first, second), jnp.maximum(first, second)
    if chain.plain:
        return low, high
    unit = max(chain.unit, float(kind.eps) / 2)
    slack = (_SLACK if unit <= rounding.CPU_UNIT else _NARROW_SLACK) * unit
    tiny = jnp.finfo(jnp.float32).tiny

    def off(value: Array) -> Array:
        # Not for infinities: a mask's −∞ is what it is, and −∞ + ∞ is not a number.
        return jnp.where(jnp.isinf(value), 0.0, slack * jnp.abs(value) + tiny)

    return low - off(low), high + off(high)


def ordered(low: Array, high: Array, ranked: Array, unit: float = 0.0) -> Array:
    """bool[tokens], whether the `ranked` are the greatest, in this order, whatever was rounded.

    Args:
      low, high: f32[tokens, n], the ends of all values.
      ranked: i32[tokens, c].
      unit: of the arithmetic on them before they are ranked.
    """
    lows, highs = (
        jnp.take_along_axis(end, ranked, axis=-1, mode="promise_in_bounds") for end in (low, high)
    )
    if unit:
        # Of a softmax's logarithm the rounding is that of a number up to log V, below 16.
        lows = lows - _RANKED_SLACK * unit * (16 + jnp.abs(lows))
    # Of NaN every comparison is false: it must not count as below.
    rivals = jnp.sum(~(high < lows[:, -1:]), axis=-1)
    return (rivals == ranked.shape[1]) & (lows[:, :-1] > highs[:, 1:]).all(-1)
