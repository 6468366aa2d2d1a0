"""A vocabulary head whose rows are sharded over the devices of a mesh.

Each device guesses the logits of its own rows, takes as many candidates among them as one device
would take of all, and computes those exactly. Logits stay where they were computed: they come out
sharded over the vocabulary, in its order, and the model's own code behind them works on them so.
Between devices travel the greatest values alone, for the limit that keeps wrong guesses below them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from hire_rewrite.ops.head.logits import gathered_logits, scored
from hire_rewrite.ops.head.spec import Endpoints, HeadSpec, HeadState
from hire_rewrite.ops.head.tail import at, with_tail
from hire_rewrite.ops.predictors import Predictor, optimistic
from hire_rewrite.ops.predictors.sharded import fitted_specs, specs_of
from hire_rewrite.ops.top_k.keys import lowest
from hire_rewrite.ops.top_k.select import scatter, top_k
from hire_rewrite.sharding.rows import RowSharding

__all__ = ["head_specs", "sharded_head"]


def sharded_head(
    x: Array,
    state: HeadState,
    layer: Array | int,
    *,
    spec: HeadSpec,
    endpoints: Endpoints,
    predictor: Predictor,
    sharding: RowSharding,
) -> tuple[Array, ...]:
    """`hire_head` on arrays that are sharded as `head_specs` says, a shard for each device."""
    some = sharding.token_axes(x.shape[0])
    tokens, whole, across = P(some), P(), P(some, sharding.axes)
    specs = head_specs(state, x.shape[1], spec, predictor, sharding)
    padding = ((0, 0), (0, spec.rows - spec.width))
    count = spec.candidates // spec.num_shards

    def guess(x: Array, state: HeadState, layer: Array) -> Array:
        return scored(predictor, x, state, layer)

    def compute(
        x: Array,
        state: HeadState,
        layer: Array,
        guessed: Array,
        ranks: tuple[Array, ...],
    ) -> tuple[Array, tuple[Array, ...]]:
        places = tuple(top_k(values, count)[1] for values in ranks)
        rows = jnp.concatenate(places, axis=-1)
        exact = gathered_logits(x, state, layer, rows, spec).astype(spec.out_dtype)
        return scatter(guessed, rows, exact), places

    def finish(values: Array, guesses: Array, places: Array) -> Array:
        return with_tail(at(values, places), places, guesses, spec, sharding.axes)

    def cut(sharded: Array) -> Array:
        return sharded[:, : spec.width]

    def padded(values: Array) -> Array:
        return jnp.pad(values, padding, constant_values=lowest(values.dtype))

    scores = sharding.map(guess, (tokens, specs, whole), across)(x, state, layer)
    better = endpoints(cut(optimistic(scores, state.predictor, layer)).astype(spec.out_dtype))
    scores = scores.astype(spec.out_dtype)
    guesses = endpoints(cut(scores))
    ends = (across,) * len(guesses)
    exact, places = sharding.map(compute, (tokens, specs, whole, across, ends), (across, ends))(
        x, state, layer, scores, tuple(map(padded, better))
    )
    values = endpoints(cut(exact))
    tail = sharding.map(finish, (across, across, across), across)
    return tuple(
        cut(tail(padded(value), padded(guess), place))
        for value, guess, place in zip(values, guesses, places, strict=True)
    )


def head_specs(
    state: HeadState, d: int, spec: HeadSpec, predictor: Predictor, sharding: RowSharding
) -> HeadState:
    """How the packed arrays (or shapes) of a head are sharded: a `PartitionSpec` for each."""
    exact, along = spec.exact, sharding.along(1)
    like = state.rows if exact is None else jax.ShapeDtypeStruct((d,), spec.compute_dtype)
    fitted = fitted_specs(predictor, like, spec.rows, spec.candidates, sharding)
    rows: Any = along if exact is None else specs_of(exact.store, like, spec.rows, sharding)
    return HeadState(rows, fitted, {}, None if state.dense is None else along)  # type: ignore[arg-type]
