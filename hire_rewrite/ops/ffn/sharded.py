"""A feed-forward block whose rows are sharded over the devices of a mesh.

Each device guesses, chooses and gathers among its own rows, all at the same time, inside a
`shard_map`. Tokens are sharded over the other axes of the mesh (a data-parallel batch is so
already), so that no device computes what another one does. The results of a block are added up:
that is the all-reduce that the dense block has too.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

from hire_rewrite.ops.ffn.block import Activation, FFNSpec, FFNState
from hire_rewrite.ops.ffn.ffn import hire_ffn
from hire_rewrite.ops.predictors import Predictor
from hire_rewrite.ops.predictors.sharded import fitted_specs
from hire_rewrite.sharding.rows import RowSharding

__all__ = ["ffn_specs", "sharded_ffn"]


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
) -> Array:
    """`hire_ffn` on arrays that are sharded as `ffn_specs` says, a shard for each device.

    Args:
      together: keep the tokens together, for the activation knows something of each.
    """

    count = x.shape[0]

    def on_some(pre: tuple[Array, ...], vectors: tuple[Array, ...]) -> Array:
        """The activation, which is written for all tokens, of some."""
        missing = ((0, count - pre[0].shape[0]), (0, 0))
        h = activation(tuple(jnp.pad(array, missing) for array in pre), vectors)
        return h[: pre[0].shape[0]]

    def on_shard(x: Array, state: FFNState, layer: Array) -> Array:
        share = None if budget is None else -(-budget // spec.num_shards)
        y = hire_ffn(
            x,
            state,
            layer,
            spec=spec.shard,
            activation=on_some,
            predictor=predictor,
            budget=share,
        )
        return lax.psum(y, sharding.axes)

    tokens = PartitionSpec(() if together else sharding.token_axes(count))
    specs = ffn_specs(state, spec, predictor, sharding)
    return sharding.map(on_shard, (tokens, specs, PartitionSpec()), tokens)(x, state, layer)


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
