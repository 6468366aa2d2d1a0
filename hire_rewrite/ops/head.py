"""The vocabulary head: guess all logits, compute exactly those that may be among the greatest.

Sampling and greedy decoding look at a few of the greatest logits; the rows of all others are read
in vain. `hire_head` scores all rows with a predictor, fetches those of the best candidates and
writes their exact logits over the guesses. Between logits and consumer a model may scale, bias,
cap, mask or perturb them: the `endpoints`. Candidates are chosen by what comes out of them, for a
bias or a mask changes the order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.ops.predictors import Predictor, State
from hire_rewrite.ops.select import top_k

Endpoints = Callable[[Array], tuple[Array, ...]]
"""Raw logits [tokens, V] to the values that the model goes on with, each [tokens, V] and each
pointwise along V."""


@dataclasses.dataclass(frozen=True)
class HeadSpec:
    """What is to be computed at a head.

    Attributes:
      width: V.
      k: how many of the greatest values are certainly exact.
      candidates: how many rows a token fetches for each endpoint, at least k.
      tail: what values that are no candidates become, `"predicted"` or `"-inf"`.
      out_dtype: of the raw logits.
      precision: of the product, as in `lax.dot_general`.
      compute_dtype: to which rows are cast after they were fetched.
      starts: for each endpoint the row that its first value belongs to; () for 0 everywhere. (An
        endpoint may have fewer than V values: padding of the vocabulary is cut off.)
    """

    width: int
    k: int
    candidates: int
    tail: str
    out_dtype: Any
    precision: Any
    compute_dtype: Any
    starts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.candidates <= self.width:
            raise HireRewriteError(
                f"HeadSpec: k={self.k}, candidates={self.candidates}, width={self.width}: they "
                "must be in that order, and k at least 1"
            )
        if self.tail not in ("predicted", "-inf"):
            raise HireRewriteError(f'HeadSpec: tail={self.tail!r} must be "predicted" or "-inf"')


class HeadState(NamedTuple):
    """The arrays of a head: rows [L, V, d], and the predictor's with the same leading axis."""

    rows: Array
    predictor: State


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
    not rank it among the candidates.

    Args:
      x: [tokens, d].
      state: see `HeadState`.
      layer: i32[], the index into the leading axis of the arrays.

    Returns:
      For each endpoint [tokens, V], in its own dtype. NaN where x is.
    """
    guessed = predictor.score(state.predictor, x, layer).astype(spec.out_dtype)
    found = [_best(values, spec.candidates)[1] for values in endpoints(guessed)]
    places = [
        own + start for own, start in zip(found, spec.starts or (0,) * len(found), strict=True)
    ]
    rows = places[0] if len(places) == 1 else jnp.concatenate(places, axis=-1)
    if rows.shape[-1] >= spec.width:
        return exact_head(_dense(x, state, layer, spec), spec=spec, endpoints=endpoints)
    raw = _scatter(guessed, rows, _gathered(x, state, layer, rows, spec))
    return tuple(
        _with_tail(values, own, spec) for values, own in zip(endpoints(raw), found, strict=True)
    )


def exact_head(raw: Array, *, spec: HeadSpec, endpoints: Endpoints) -> tuple[Array, ...]:
    """The endpoints of dense logits raw: [tokens, V], with the tail that the spec asks for."""
    if spec.tail == "predicted":
        return endpoints(raw)
    return tuple(
        _with_tail(values, _best(values, spec.candidates)[1], spec) for values in endpoints(raw)
    )


def dense_head(
    x: Array, state: HeadState, layer: Array | int, *, spec: HeadSpec, endpoints: Endpoints
) -> tuple[Array, ...]:
    """The endpoints of x @ rows.T as the model has them, for x: [tokens, d]."""
    return endpoints(_dense(x, state, layer, spec))


def _dense(x: Array, state: HeadState, layer: Array | int, spec: HeadSpec) -> Array:
    rows = lax.dynamic_index_in_dim(state.rows, layer, keepdims=False)
    return lax.dot_general(
        x,
        rows.astype(spec.compute_dtype),
        (((1,), (1,)), ((), ())),
        precision=spec.precision,
        preferred_element_type=spec.out_dtype,
    )


def _gathered(x: Array, state: HeadState, layer: Array | int, rows: Array, spec: HeadSpec) -> Array:
    """Exact raw logits [tokens, c] of each token's own rows: i32[tokens, c]."""
    layers, width, d = state.rows.shape
    # One flat index: slicing the layer first would copy it.
    flat = state.rows.reshape(layers * width, d)
    fetched = flat.at[rows + layer * width].get(mode="promise_in_bounds")
    return lax.dot_general(
        fetched.astype(spec.compute_dtype),
        x,
        (((2,), (1,)), ((0,), (0,))),
        precision=spec.precision,
        preferred_element_type=spec.out_dtype,
    )


def _with_tail(values: Array, candidates: Array, spec: HeadSpec) -> Array:
    """`values` [tokens, V] at the candidates, the spec's tail elsewhere."""
    exact = jnp.take_along_axis(values, candidates, axis=-1, mode="promise_in_bounds")
    if spec.tail == "-inf":
        return _scatter(jnp.full_like(values, -jnp.inf), candidates, exact)
    kth = lax.stop_gradient(_best(exact, spec.k)[0][:, -1:])
    return _scatter(jnp.minimum(values, _below(kth)), candidates, exact)


def _best(values: Array, k: int) -> tuple[Array, Array]:
    """`top_k`, of all values if there are fewer than k (the padding may have been cut off)."""
    return top_k(values, min(k, values.shape[-1]))


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


def _scatter(values: Array, indices: Array, updates: Array) -> Array:
    """`values` [tokens, V] with updates [tokens, c] at each token's indices."""
    token = jnp.arange(values.shape[0])[:, None]
    return values.at[token, indices].set(updates, mode="promise_in_bounds")
