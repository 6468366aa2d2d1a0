"""What a head is made of: dense logits, guesses, candidates, and what is made of them.

Between logits and consumer a model may scale, bias, cap, mask or perturb them: the `endpoints`.
Candidates are chosen by what comes out of them, for a bias or a mask changes the order.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from hire_rewrite.ops.encodings import picked_products
from hire_rewrite.ops.gather import gather_rows, gathered_matmul
from hire_rewrite.ops.head.spec import Endpoints, HeadSpec, HeadState, best
from hire_rewrite.ops.head.tail import at, with_tail
from hire_rewrite.ops.predictors import Predictor, optimistic, proportional
from hire_rewrite.ops.predictors.protocol import Choose
from hire_rewrite.ops.top_k.select import scatter

__all__ = [
    "candidates_of",
    "dense_logits",
    "exact_values",
    "finished",
    "gathered",
    "gathered_logits",
    "scored",
]

_LARGE, _UNIT = 2.0**64, 2.0**100
"""A token that holds a number of the first size is scored divided by the second, exactly."""


def dense_logits(x: Array, state: HeadState, layer: Array | int, spec: HeadSpec) -> Array:
    """[tokens, V] for x: [tokens, d], by the best rows that are held: as the model has them, or as
    they are stored."""
    held = state.rows if spec.exact is None else state.dense
    dtype, out_dtype = spec.compute_dtype, jnp.bfloat16 if spec.cast else spec.out_dtype
    if spec.exact is None or held is not None:
        rows = lax.dynamic_index_in_dim(held, layer, keepdims=False)
    else:
        rows = spec.exact.decode(state.rows, layer)
        if not spec.certify:
            x, dtype, out_dtype = x.astype(jnp.float32), rows.dtype, rows.dtype
    products = lax.dot_general(
        x,
        rows[: spec.width].astype(dtype),
        (((1,), (1,)), ((), ())),
        precision=spec.precision,
        preferred_element_type=out_dtype,
    )
    return products.astype(spec.out_dtype)


def gathered_logits(
    x: Array, state: HeadState, layer: Array | int, rows: Array, spec: HeadSpec
) -> Array:
    """Exact raw logits [tokens, c] of each token's own rows: i32[tokens, c]."""
    if spec.exact is not None:
        products = picked_products(spec.exact, x, state.rows, layer, rows)
        return products.astype(spec.out_dtype)
    return gathered_matmul(
        x,
        state.rows,
        layer,
        rows,
        compute_dtype=spec.compute_dtype,
        out_dtype=spec.out_dtype,
        precision=spec.precision,
    )


def gathered(state: HeadState, layer: Array | int, rows: Array, spec: HeadSpec) -> Array:
    """[*rows.shape, d], the rows with these numbers as the model's product has them."""
    if spec.exact is None:
        some = gather_rows(state.rows, layer, rows)
    else:
        some = spec.exact.decode_rows(state.rows, layer, rows)
    return some.astype(spec.compute_dtype)


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
        return [best(value, count, spec.num_shards)[1] for value in values]

    def rows_of(places: list[Array]) -> Array:
        starts = spec.starts or (0,) * len(places)
        rows = [place + start for place, start in zip(places, starts, strict=True)]
        return rows[0] if len(rows) == 1 else jnp.concatenate(rows, axis=-1)

    def choose(scores: Array, count: int) -> Array:
        count = -(-count // spec.num_shards) * spec.num_shards
        return rows_of(greatest(scores[:, : spec.width], count))

    scores = scored(predictor, x, state, layer, choose)
    better = optimistic(scores, state.predictor, layer)[:, : spec.width]
    places = greatest(better, spec.candidates)
    return scores[:, : spec.width], places, rows_of(places)


def scored(
    predictor: Predictor,
    x: Array,
    state: HeadState,
    layer: Array | int,
    choose: Choose | None = None,
) -> Array:
    """A predictor's scores f32[tokens, rows], also of tokens of huge numbers: their products with
    integers would overflow where those with the rows themselves do not."""
    arrays = state.guessing(predictor)
    if not proportional(predictor) or float(jnp.finfo(x.dtype).max) < _LARGE:
        return predictor.score(arrays, x, layer, choose)
    ordinary = (jnp.abs(x) < _LARGE).all(-1, keepdims=True)
    unit = jnp.where(ordinary, jnp.float32(1), jnp.float32(_UNIT))
    return predictor.score(arrays, x / unit.astype(x.dtype), layer, choose) * unit


def finished(
    scores: Array,
    rows: Array,
    exact: Array,
    places: list[Array],
    spec: HeadSpec,
    endpoints: Endpoints,
) -> tuple[Array, ...]:
    """The endpoints, of exact logits [tokens, c] at `rows` and scores elsewhere, with the tail."""
    guessed, exact = scores.astype(spec.out_dtype), exact.astype(spec.out_dtype)
    guesses = endpoints(guessed)
    if len(guesses) == 1 and guesses[0] is guessed:  # no code behind the logits
        return (with_tail(exact, places[0], guessed, spec),)
    values = endpoints(scatter(guessed, rows, exact))
    return tuple(
        with_tail(at(value, place), place, guess, spec)
        for value, guess, place in zip(values, guesses, places, strict=True)
    )


def exact_values(raw: Array, *, spec: HeadSpec, endpoints: Endpoints) -> tuple[Array, ...]:
    """The endpoints of dense logits raw: [tokens, V], with the tail that the spec asks for.

    This is what the exact top k of a head means, wherever its logits are computed.
    """
    if spec.tail == "predicted":
        return endpoints(raw)
    return tuple(
        with_tail(*best(values, spec.candidates, spec.num_shards), values, spec)
        for values in endpoints(raw)
    )
