"""The vocabulary head: guess all logits, compute exactly those that may be among the greatest.

Sampling and greedy decoding look at a few of the greatest logits; the rows of all others are read
in vain. `hire_head` scores all rows with a predictor, fetches those of the best candidates and
writes their exact logits over the guesses. Between logits and consumer a model may scale, bias,
cap, mask or perturb them: the `endpoints`. Candidates are chosen by what comes out of them, for a
bias or a mask changes the order.

A head may be certified: then its greatest values are proved to be the dense head's, and tokens for
which the proof fails are computed densely.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import Array, lax

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.ops import kernels
from hire_rewrite.ops.certify import proof as certify
from hire_rewrite.ops.certify import rounding
from hire_rewrite.ops.ffn.products import Kernel
from hire_rewrite.ops.head.spec import Endpoints, HeadSpec, HeadState, best, check_product
from hire_rewrite.ops.predictors import Certifying, Predictor, certifies, hopeful
from hire_rewrite.ops.products import fetch, where_they_are
from hire_rewrite.ops.top_k.da_top_k import da_top_k
from hire_rewrite.ops.top_k.select import scatter

__all__ = [
    "Endpoints",
    "HeadSpec",
    "HeadState",
    "candidates_of",
    "certified",
    "dense_head",
    "dense_logits",
    "exact_head",
    "finished",
    "hire_head",
]


_TOGETHER = 16
"""Tokens whose candidates are fetched at a time to be certified."""


def hire_head(
    x: Array,
    state: HeadState,
    layer: Array | int,
    *,
    spec: HeadSpec,
    endpoints: Endpoints,
    predictor: Predictor,
) -> tuple[Array, ...]:
    """The endpoints of x @ rows.T, exact for each token's candidates and guessed for the rest.

    The k greatest values of each endpoint are exact ones: the others are kept below the k-th
    greatest exact value, so a wrong guess cannot win. A row is missed only if the predictor does
    not rank it among the candidates; never of the `spec.certify` greatest (see `certified`).

    Args:
      x: [tokens, d].
      state: see `HeadState`.
      layer: i32[], the index into the leading axis of the arrays.

    Returns:
      For each endpoint [tokens, V], in its own dtype. NaN where x is.
    """
    if spec.certify:
        return certified(x, state, layer, spec=spec, endpoints=endpoints, predictor=predictor)[0]
    scores, found, rows = candidates_of(x, state, layer, spec, endpoints, predictor)
    if rows.shape[-1] >= spec.width:
        return exact_head(dense_logits(x, state, layer, spec), spec=spec, endpoints=endpoints)
    exact = gathered(x, state, layer, rows, spec)
    return finished(scores, rows, exact, found, spec, endpoints)


def certified(
    x: Array,
    state: HeadState,
    layer: Array | int,
    *,
    spec: HeadSpec,
    endpoints: Endpoints,
    predictor: Predictor,
) -> tuple[tuple[Array, ...], Array]:
    """`hire_head` where a token's result is proved, and `exact_head` where it is not.

    In each endpoint's result the `spec.certify` greatest values stand where the dense head has its
    own, in the same order, whatever order the dense head adds in. If the proof fails for one
    token, the dense product is computed for all, and used for that one alone. (Under `vmap` it is
    always computed.) `docs/certify.md` says what is proved and what is supposed.

    Args: as of `hire_head`. The code of `endpoints` must be monotone in each logit.

    Returns:
      For each endpoint [tokens, V], and bool[tokens], which tokens were proved.

    Raises:
      HireRewriteError: the predictor has no bound, or the endpoints may not be monotone.
    """
    if not isinstance(predictor, Certifying) or not certifies(predictor):
        raise HireRewriteError(
            f"certify: {predictor} has no bound of its errors: give Quantized(), or leave certify "
            "out"
        )
    check_product(x.dtype, spec.out_dtype, spec.precision)
    scores, found, rows = candidates_of(x, state, layer, spec, endpoints, predictor)
    if rows.shape[-1] >= spec.width:
        raw = dense_logits(x, state, layer, spec)
        results = exact_head(raw, spec=spec, endpoints=endpoints)
        return results, jnp.ones(x.shape[0], bool)
    positive, negative, roundings = _signed_sums(x, state, layer, rows, spec)
    results = finished(scores, rows, positive - negative, found, spec, endpoints)

    proved = certify.proved(
        *lax.stop_gradient((x, scores, positive, negative, results)),
        state,
        layer,
        rows,
        found,
        spec=spec,
        endpoints=endpoints,
        predictor=predictor,
        roundings=roundings,
    )

    def without_proof() -> tuple[Array, ...]:
        dense = exact_head(dense_logits(x, state, layer, spec), spec=spec, endpoints=endpoints)
        return tuple(jnp.where(proved[:, None], *both) for both in zip(results, dense, strict=True))

    return lax.cond(proved.all(), lambda: results, without_proof), proved


def candidates_of(
    x: Array,
    state: HeadState,
    layer: Array | int,
    spec: HeadSpec,
    endpoints: Endpoints,
    predictor: Predictor,
) -> tuple[Array, list[Array], Array]:
    """What is guessed, and the rows that are worth an exact product.

    Returns:
      Scores f32[tokens, V]; for each endpoint where its candidates stand in it, i32[tokens, c]; and
      the rows that all of those belong to, i32[tokens, Σ c].
    """

    def greatest(scores: Array, count: int) -> list[Array]:
        values = endpoints(scores.astype(spec.out_dtype))
        return [best(value, count, spec.parts)[1] for value in values]

    def rows_of(places: list[Array]) -> Array:
        starts = spec.starts or (0,) * len(places)
        rows = [own + start for own, start in zip(places, starts, strict=True)]
        return rows[0] if len(rows) == 1 else jnp.concatenate(rows, axis=-1)

    def choose(scores: Array, count: int) -> Array:
        return rows_of(greatest(scores[:, : spec.width], -(-count // spec.parts) * spec.parts))

    scores = predictor.score(state.predictor, x, layer, choose)
    better = hopeful(scores, state.predictor, layer)[:, : spec.width]
    found = greatest(better, spec.candidates)
    return scores[:, : spec.width], found, rows_of(found)


def finished(
    scores: Array,
    rows: Array,
    exact: Array,
    found: list[Array],
    spec: HeadSpec,
    endpoints: Endpoints,
) -> tuple[Array, ...]:
    """The endpoints, of exact logits [tokens, c] at `rows` and scores elsewhere, with the tail."""
    guessed, exact = scores.astype(spec.out_dtype), exact.astype(spec.out_dtype)
    guesses = endpoints(guessed)
    if len(guesses) == 1 and guesses[0] is guessed:  # no code behind the logits
        return (with_tail(exact, found[0], guessed, spec),)
    values = endpoints(scatter(guessed, rows, exact))
    return tuple(
        with_tail(at(one, own), own, guess, spec)
        for one, guess, own in zip(values, guesses, found, strict=True)
    )


def exact_head(raw: Array, *, spec: HeadSpec, endpoints: Endpoints) -> tuple[Array, ...]:
    """The endpoints of dense logits raw: [tokens, V], with the tail that the spec asks for."""
    if spec.tail == "predicted":
        return endpoints(raw)
    return tuple(
        with_tail(*best(values, spec.candidates, spec.parts), values, spec)
        for values in endpoints(raw)
    )


def dense_head(
    x: Array, state: HeadState, layer: Array | int, *, spec: HeadSpec, endpoints: Endpoints
) -> tuple[Array, ...]:
    """The endpoints of x @ rows.T as the model has them, for x: [tokens, d]."""
    return endpoints(dense_logits(x, state, layer, spec))


def dense_logits(x: Array, state: HeadState, layer: Array | int, spec: HeadSpec) -> Array:
    rows = lax.dynamic_index_in_dim(state.rows, layer, keepdims=False)[: spec.width]
    return lax.dot_general(
        x,
        rows.astype(spec.compute_dtype),
        (((1,), (1,)), ((), ())),
        precision=spec.precision,
        preferred_element_type=spec.out_dtype,
    )


def gathered(x: Array, state: HeadState, layer: Array | int, rows: Array, spec: HeadSpec) -> Array:
    """Exact raw logits [tokens, c] of each token's own rows: i32[tokens, c]."""

    def reference(x: Array, stacked: Array, layer: Array, rows: Array) -> Array:
        return lax.dot_general(
            fetch(stacked, layer, rows).astype(spec.compute_dtype),
            x,
            (((2,), (1,)), ((0,), (0,))),
            precision=spec.precision,
            preferred_element_type=spec.out_dtype,
        )

    def by(kernel: Kernel, x: Array, stacked: Array, layer: Array, rows: Array) -> Array:
        single, index = where_they_are(stacked, layer, rows)
        return kernel(x.astype(jnp.float32), single, index).astype(spec.out_dtype)

    dtypes = (state.rows.dtype, x.dtype, spec.compute_dtype, spec.out_dtype or x.dtype)
    layer = jnp.asarray(layer, jnp.int32)
    cpu = functools.partial(by, kernels.cpu.fetched_product)
    tpu = functools.partial(by, kernels.tpu.fetched_product)
    own = {
        "cpu": cpu if kernels.cpu.usable(*dtypes) else None,
        "tpu": tpu if kernels.tpu.fits_single(x, state.rows, rows) else None,
    }
    return kernels.call(reference, x, state.rows, layer, rows, **own)


def _signed_sums(
    x: Array, state: HeadState, layer: Array | int, rows: Array, spec: HeadSpec
) -> tuple[Array, Array, int]:
    """`rounding.signed_sums` of the terms of each token's own products, f32[tokens, c] twice."""
    roundings = 0

    def sums(each: tuple[Array, Array]) -> tuple[Array, Array]:
        nonlocal roundings
        token, chosen = each
        fetched = fetch(state.rows, layer, chosen[None])[0].astype(spec.compute_dtype)
        products = fetched.astype(jnp.float32) * token.astype(jnp.float32)
        positive, negative, roundings = rounding.signed_sums(products)
        return positive, negative

    # Rows of many tokens at a time would fill the memory.
    batch = min(x.shape[0], _TOGETHER)
    positive, negative = lax.map(sums, (x, rows), batch_size=batch)
    return positive, negative, roundings


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
    shift = _shift(exact, at(guesses, candidates), 1 if axes else spec.parts, axes)
    tail = guesses + lax.stop_gradient(shift).astype(guesses.dtype)
    known = lax.stop_gradient(exact)
    kth = (
        da_top_k(known, spec.k, axis_name=axes, recall_target=1.0) if axes else best(known, spec.k)
    )
    return scatter(jnp.minimum(tail, _below(kth[0][:, -1:])), candidates, exact)


def _shift(exact: Array, guessed: Array, parts: int, axes: tuple[str, ...]) -> Array:
    """f32[tokens, 1], what the tail's guesses lack to have the right mass, as candidates show.

    With errors r = exact − guess that are normal, E exp(exact) = exp(guess + E r + Var r / 2). The
    errors are those of the half of the candidates that came last, which are nearest to the tail.
    """

    def last(array: Array) -> Array:
        by_part = array.reshape(array.shape[0], parts, -1)
        return by_part[..., by_part.shape[-1] // 2 :].astype(jnp.float32)

    def total(array: Array) -> Array:
        here = array.sum((-2, -1))
        return lax.psum(here, axes) if axes else here

    error = last(exact) - last(guessed)
    known = jnp.isfinite(error)
    count = jnp.maximum(total(known), 1)
    mean = total(jnp.where(known, error, 0.0)) / count
    spread = total(jnp.where(known, jnp.square(error - mean[:, None, None]), 0.0)) / count
    return (mean + spread / 2)[:, None]


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
