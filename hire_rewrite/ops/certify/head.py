"""A vocabulary head whose greatest values are proved to be the dense head's.

Tokens for which the proof fails are computed densely. `docs/certify.md` says what is proved and
what is supposed.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.ops.certify import proof, rounding
from hire_rewrite.ops.gather import by_tokens
from hire_rewrite.ops.head.logits import (
    candidates_of,
    dense_logits,
    exact_values,
    finished,
    gathered,
)
from hire_rewrite.ops.head.spec import Endpoints, HeadSpec, HeadState
from hire_rewrite.ops.predictors import Certifying, Predictor, certifies
from hire_rewrite.ops.usage import Usage

__all__ = ["certified", "counted_certified"]

_BATCH = 16
"""Tokens whose candidates are gathered at a time."""


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
    always computed.)

    Args: as of `hire_head`. The code of `endpoints` must be monotone in each logit.

    Returns:
      For each endpoint [tokens, V], and bool[tokens], which tokens were proved.

    Raises:
      HireRewriteError: the predictor has no bound, or the endpoints may not be monotone.
    """
    values, usage = counted_certified(
        x, state, layer, spec=spec, endpoints=endpoints, predictor=predictor
    )
    assert usage.proved is not None
    return values, usage.proved


def counted_certified(
    x: Array,
    state: HeadState,
    layer: Array | int,
    *,
    spec: HeadSpec,
    endpoints: Endpoints,
    predictor: Predictor,
) -> tuple[tuple[Array, ...], Usage]:
    """`certified`, and what it read: rows of each token, and which tokens were proved."""
    if not isinstance(predictor, Certifying) or not certifies(predictor):
        raise HireRewriteError(
            f"certify: {predictor} has no bound of its errors: give Quantized(), or leave certify "
            "out"
        )
    rounding.check_product(x.dtype, spec.out_dtype, spec.precision)
    scores, places, rows = candidates_of(x, state, layer, spec, endpoints, predictor)

    def dense() -> tuple[Array, ...]:
        raw = dense_logits(x, state, layer, spec)
        return exact_values(raw, spec=spec, endpoints=endpoints)

    if rows.shape[-1] >= spec.width:
        return dense(), Usage(whole=True, proved=jnp.ones(x.shape[0], bool))
    positive, negative, roundings = _signed_sums(x, state, layer, rows, spec)
    results = finished(scores, rows, positive - negative, places, spec, endpoints)
    proved = proof.proved(
        *lax.stop_gradient((x, scores, positive, negative, results)),
        state,
        layer,
        rows,
        places,
        spec=spec,
        endpoints=endpoints,
        predictor=predictor,
        roundings=roundings,
    )

    def without_proof() -> tuple[Array, ...]:
        both = zip(results, dense(), strict=True)
        return tuple(jnp.where(proved[:, None], result, other) for result, other in both)

    usage = Usage(rows.shape[0] * rows.shape[1], whole=None, proved=proved)
    return lax.cond(proved.all(), lambda: results, without_proof), usage


def _signed_sums(
    x: Array, state: HeadState, layer: Array | int, rows: Array, spec: HeadSpec
) -> tuple[Array, Array, int]:
    """`rounding.signed_sums` of the terms of each token's own products, f32[tokens, c] twice."""
    roundings = 0

    def sums(x: Array, rows: Array) -> tuple[Array, Array]:
        nonlocal roundings
        products = (
            gathered(state, layer, rows, spec).astype(jnp.float32) * x.astype(jnp.float32)[:, None]
        )
        positive, negative, roundings = rounding.signed_sums(products)
        return positive, negative

    positive, negative = by_tokens(sums, (x, rows), _BATCH)
    return positive, negative, roundings
