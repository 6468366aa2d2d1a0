"""The vocabulary head: guess all logits, compute exactly those that may be among the greatest.

Sampling and greedy decoding look at a few of the greatest logits; the rows of all others are read
in vain. `hire_head` scores all rows with a predictor, gathers those of the best candidates and
writes their exact logits over the guesses. `exact_head` and `dense_head` read all rows.
"""

from __future__ import annotations

from jax import Array

from hire_rewrite.ops.certify.head import counted_certified
from hire_rewrite.ops.head.logits import (
    candidates_of,
    dense_logits,
    exact_values,
    finished,
    gathered_logits,
)
from hire_rewrite.ops.head.spec import Endpoints, HeadSpec, HeadState
from hire_rewrite.ops.predictors import Predictor
from hire_rewrite.ops.usage import Usage

__all__ = [
    "Endpoints",
    "HeadSpec",
    "HeadState",
    "counted_head",
    "dense_head",
    "exact_head",
    "hire_head",
]


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
    return counted_head(x, state, layer, spec=spec, endpoints=endpoints, predictor=predictor)[0]


def counted_head(
    x: Array,
    state: HeadState,
    layer: Array | int,
    *,
    spec: HeadSpec,
    endpoints: Endpoints,
    predictor: Predictor,
) -> tuple[tuple[Array, ...], Usage]:
    """`hire_head`, and what it read: rows of each token, and which tokens were proved."""
    if spec.certify:
        return counted_certified(
            x, state, layer, spec=spec, endpoints=endpoints, predictor=predictor
        )
    scores, places, rows = candidates_of(x, state, layer, spec, endpoints, predictor)
    if rows.shape[-1] >= spec.width:
        values = exact_head(x, state, layer, spec=spec, endpoints=endpoints)
        return values, Usage(whole=True)
    exact = gathered_logits(x, state, layer, rows, spec)
    values = finished(scores, rows, exact, places, spec, endpoints)
    return values, Usage(rows.shape[0] * rows.shape[1])


def exact_head(
    x: Array, state: HeadState, layer: Array | int, *, spec: HeadSpec, endpoints: Endpoints
) -> tuple[Array, ...]:
    """What `hire_head` arrives at when it misses nothing, in dense arithmetic, for x: [tokens, d].

    Differentiable.
    """
    return exact_values(dense_logits(x, state, layer, spec), spec=spec, endpoints=endpoints)


def dense_head(
    x: Array, state: HeadState, layer: Array | int, *, spec: HeadSpec, endpoints: Endpoints
) -> tuple[Array, ...]:
    """The endpoints of x @ rows.T as the model has them, for x: [tokens, d]."""
    return endpoints(dense_logits(x, state, layer, spec))
