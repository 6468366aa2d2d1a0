"""A vocabulary head measured: dense, on its exact top k and rewritten, on the same tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from hire_rewrite.ops.certify.head import certified
from hire_rewrite.ops.head.logits import candidates_of, dense_logits, exact_values, finished
from hire_rewrite.ops.head.spec import Endpoints, HeadSpec, HeadState
from hire_rewrite.ops.head.tail import at
from hire_rewrite.ops.predictors import Predictor, optimistic
from hire_rewrite.ops.quality import Choice, Comparison, Measured
from hire_rewrite.ops.top_k.select import marked

__all__ = ["measured_head"]


def measured_head(
    x: Array,
    state: HeadState,
    layer: Array | int,
    *,
    spec: HeadSpec,
    endpoints: Endpoints,
    predictor: Predictor,
) -> Measured:
    """All endpoints, each [tokens, V], for x: [tokens, d]; the probabilities of the last one are
    compared, and the units of the choice are its rows.

    The rewritten ones are those of `hire_head`, where each token has candidates of its own.
    """
    scores, places, rows = candidates_of(x, state, layer, spec, endpoints, predictor)
    raw = dense_logits(x, state, layer, spec)
    dense, exact = endpoints(raw), exact_values(raw, spec=spec, endpoints=endpoints)
    proved = None
    if spec.certify:
        rewritten, proved = certified(
            x, state, layer, spec=spec, endpoints=endpoints, predictor=predictor
        )
    elif spec.num_shards == 1 and rows.shape[-1] >= spec.width:
        rewritten = exact
    else:
        stored = (
            raw if state.dense is None else dense_logits(x, state._replace(dense=None), layer, spec)
        )
        rewritten = finished(scores, rows, at(stored, rows), places, spec, endpoints)
    last = dense[-1].astype(jnp.float32)
    order = optimistic(scores, state.predictor, layer).astype(spec.out_dtype)
    guessed = endpoints(order)[-1].astype(jnp.float32)

    def chances(values: tuple[Array, ...]) -> Array:
        return jax.nn.softmax(values[-1].astype(jnp.float32), axis=-1)

    chance = chances(dense)
    width = last.shape[-1]
    k, candidates = min(spec.k, width), marked(places[-1], width)
    choice = Choice(last, guessed, candidates, k, chance, -jnp.inf)
    comparison = Comparison(chance, chances(exact), chances(rewritten), choice, proved)
    return Measured(exact, rewritten, comparison)
