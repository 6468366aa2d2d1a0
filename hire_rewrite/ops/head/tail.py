"""The tail of a head: what stands where no exact logit was computed.

Guesses are moved so that together they have the right mass, and are kept below the greatest exact
values, so that a wrong guess cannot win.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from hire_rewrite.ops.head.spec import HeadSpec, best
from hire_rewrite.ops.top_k.da_top_k import da_top_k
from hire_rewrite.ops.top_k.select import scatter

__all__ = ["at", "with_tail"]


def at(values: Array, places: Array) -> Array:
    """[tokens, c], of values: [tokens, V] those at each token's own places: i32[tokens, c]."""
    return jnp.take_along_axis(values, places, axis=-1, mode="promise_in_bounds")


def with_tail(
    exact: Array,
    candidates: Array,
    guesses: Array,
    spec: HeadSpec,
    axes: tuple[str, ...] = (),
) -> Array:
    """[tokens, V], `exact` [tokens, c] at the candidates, the spec's tail elsewhere.

    The tail is made of the guesses: [tokens, V]. With `axes`, inside `shard_map` over them, each
    device has its own guesses and candidates.
    """
    if spec.tail == "-inf":
        return scatter(jnp.full_like(guesses, -jnp.inf), candidates, exact)
    shift = _shift(exact, at(guesses, candidates), 1 if axes else spec.num_shards, axes)
    # It is a square, and −infinity plus infinity would be NaN.
    most = shift.dtype.type(min(jnp.finfo(dtype).max for dtype in (guesses.dtype, shift.dtype)))
    tail = guesses + lax.stop_gradient(lax.clamp(-most, shift, most)).astype(guesses.dtype)
    known = lax.stop_gradient(exact)
    if axes:
        greatest, _ = da_top_k(known, spec.k, axis_name=axes, recall_target=1.0)
    else:
        greatest, _ = best(known, spec.k)
    return scatter(jnp.minimum(tail, _below(greatest[:, -1:])), candidates, exact)


def _shift(exact: Array, guessed: Array, num_shards: int, axes: tuple[str, ...]) -> Array:
    """f32[tokens, 1], what the tail's guesses lack to have the right mass, as candidates show.

    With errors r = exact − guess that are normal, E exp(exact) = exp(guess + E r + Var r / 2). The
    errors are those of the half of the candidates that came last, which are nearest to the tail.
    """

    def last(array: Array) -> Array:
        shards = array.reshape(array.shape[0], num_shards, array.shape[1] // num_shards)
        return shards[..., shards.shape[-1] // 2 :].astype(jnp.float32)

    def total(array: Array) -> Array:
        here = array.sum((-2, -1))
        return lax.psum(here, axes) if axes else here

    error = last(exact) - last(guessed)
    known = jnp.isfinite(error)
    count = jnp.maximum(total(known.astype(jnp.float32)), 1.0)
    mean = total(jnp.where(known, error, 0.0)) / count
    deviations = jnp.where(known, error - mean[:, None, None], 0.0)
    return (mean + total(jnp.square(deviations)) / count / 2)[:, None]


def _below(values: Array) -> Array:
    """A value less than each of `values`; −infinity for −infinity, and infinity for NaN.

    Every number is less than NaN in the order of `top_k`.
    """
    tiny = jnp.finfo(values.dtype).tiny
    # Hardware that flushes subnormal numbers to zero cannot tell them from it.
    below = jnp.where(
        (values > -tiny) & (values <= tiny),
        -tiny,
        jnp.nextafter(values, jnp.full_like(values, -jnp.inf)),
    )
    return jnp.where(jnp.isnan(values), jnp.inf, below).astype(values.dtype)
