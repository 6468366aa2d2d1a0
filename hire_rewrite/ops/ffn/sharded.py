"""A feed-forward block whose rows are sharded over the devices of a mesh.

Each device guesses, chooses and gathers among its own rows, all at the same time, inside a
`shard_map`. Tokens are sharded over the other axes of the mesh (a data-parallel batch is so
already), so that no device computes what another one does. The results of a block are added up:
that is the all-reduce that the dense block has too.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

from hire_rewrite.ops.ffn.block import Activation, FFNSpec, FFNState
from hire_rewrite.ops.ffn.ffn import counted_ffn
from hire_rewrite.ops.ffn.positive import PositiveFFNSpec, PositiveFFNState, counted_positive_ffn
from hire_rewrite.ops.predictors import Predictor
from hire_rewrite.ops.predictors.sharded import fitted_specs
from hire_rewrite.ops.usage import tally
from hire_rewrite.sharding.rows import RowSharding

__all__ = ["ffn_specs", "positive_specs", "sharded_ffn", "sharded_positive_ffn"]


def sharded_ffn(
    x: Array,
    state: FFNState,
    layer: Array | int,
    *,
    spec: FFNSpec,
    activation: Activation,
    predictor: Predictor,
    sharding: RowSharding,
    together: bool,
    budget: int | None = None,
    counted: bool = False,
) -> Any:
    """`hire_ffn` on arrays that are sharded as `ffn_specs` says, a shard for each device.

    Args:
      together: keep the tokens together, for the activation knows something of each.
      counted: return the `tally` of each device too, u32[devices, ...].
    """
    share = None if budget is None else -(-budget // spec.num_shards)
    block = functools.partial(counted_ffn, spec=spec.shard, predictor=predictor, budget=share)
    specs = ffn_specs(state, spec, predictor, sharding)
    return _on_shards(block, x, state, layer, activation, specs, sharding, together, counted)


def sharded_positive_ffn(
    x: Array,
    state: PositiveFFNState,
    layer: Array | int,
    *,
    spec: PositiveFFNSpec,
    activation: Activation,
    sharding: RowSharding,
    together: bool,
    counted: bool = False,
) -> Any:
    """`positive_ffn` on arrays that are sharded as `positive_specs` says: see `sharded_ffn`.

    A device reads all of its rows where its neurons alone are more than its share of the budget.
    """
    devices = sharding.num_shards
    own = dataclasses.replace(
        spec, width=spec.width // devices, budget=max(1, spec.budget // devices)
    )
    block = functools.partial(counted_positive_ffn, spec=own)
    specs = positive_specs(state, spec, sharding)
    return _on_shards(block, x, state, layer, activation, specs, sharding, together, counted)


def _on_shards(
    block: Callable[..., Any],
    x: Array,
    state: Any,
    layer: Array | int,
    activation: Activation,
    specs: Any,
    sharding: RowSharding,
    together: bool,
    counted: bool,
) -> Any:
    """The sum of what each device's rows make of x: [tokens, d_in]."""
    count = x.shape[0]

    def on_some(pre: tuple[Array, ...], vectors: tuple[Array, ...]) -> Array:
        """The activation, which is written for all tokens, of some."""
        missing = ((0, count - pre[0].shape[0]), (0, 0))
        h = activation(tuple(jnp.pad(array, missing) for array in pre), vectors)
        return h[: pre[0].shape[0]]

    def on_shard(x: Array, state: Any, layer: Array) -> Any:
        y, usage = block(x, state, layer, activation=on_some)
        y = lax.psum(y, sharding.axes)
        return (y, tally(x.shape[0], usage)[None]) if counted else y

    some = () if together else sharding.token_axes(count)
    tokens, devices = PartitionSpec(some), PartitionSpec((*sharding.axes, *some))
    results = (tokens, devices) if counted else tokens
    return sharding.map(on_shard, (tokens, specs, PartitionSpec()), results)(x, state, layer)


def ffn_specs(
    state: FFNState, spec: FFNSpec, predictor: Predictor, sharding: RowSharding
) -> FFNState:
    """How the packed arrays (or shapes) of a block are sharded: a `PartitionSpec` for each."""
    rows: Any = sharding.along(1)
    return FFNState(
        up=rows,
        down=rows,
        vectors=(rows,) * len(state.vectors),
        predictor=fitted_specs(predictor, state.up, spec.scored_rows, None, sharding),
        norms=None if state.norms is None else rows,
    )


def positive_specs(
    state: PositiveFFNState, spec: PositiveFFNSpec, sharding: RowSharding
) -> PositiveFFNState:
    """`ffn_specs` of a block without its zeros, with one gate and rows that are not encoded."""
    rows: Any = sharding.along(1)
    norms: Any = sharding.along(2)
    guess: Any = {}
    if spec.predictor is not None:
        guess = fitted_specs(spec.predictor, state.up["rows"], spec.width, None, sharding)
    return PositiveFFNState(
        gates=dict.fromkeys(state.gates, rows),
        up=dict.fromkeys(state.up, rows),
        down=dict.fromkeys(state.down, rows),
        vectors=(rows,) * len(state.vectors),
        predictor=guess,
        bound=dict.fromkeys(state.bound, rows),
        norms=norms,
    )
