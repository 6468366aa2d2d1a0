"""Linear layers whose weights are sharded over the devices of a mesh.

Each device has a shard: some rows, some columns, or some columns of some rows. It multiplies it by
the inputs of its columns, in a `shard_map`. Results lie where their rows do. Where columns are
sharded, the results of the devices are summed, which is the all-reduce that the dense product has
too. Tokens are sharded over the other axes of the mesh.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jax import Array, lax
from jax.sharding import PartitionSpec as P

from hire_rewrite.ops.linear.linear import LinearSpec, LinearState
from hire_rewrite.sharding.rows import RowSharding

__all__ = ["sharded_linears"]


def sharded_linears(
    run: Callable[..., Sequence[Array]],
    x: Array,
    states: Sequence[LinearState],
    layer: Array | int,
    *,
    spec: LinearSpec,
    sharding: RowSharding,
) -> list[Array]:
    """`run` of the same x with several weights, whose arrays have the devices' shards in a row on
    their leading axis: f32[tokens, n] of each.

    Args:
      run: (x, states, layer, spec) to the results of one device, such as `hire_linears`.
      spec: of the whole layer: each device takes its share of k, of its own columns.
    """
    some = sharding.token_axes(x.shape[0])
    inputs, outputs = P(some, sharding.columns), P(some, sharding.rows)
    own = spec.of_columns(sharding.num_columns)

    def on_shard(x: Array, states: Sequence[LinearState], layer: Array) -> list[Array]:
        results = run(x, states, layer, spec=own)
        return [lax.psum(y, sharding.columns) if sharding.columns else y for y in results]

    shards = P(sharding.axes)
    mapped = sharding.map(on_shard, (inputs, [shards] * len(states), P()), [outputs] * len(states))
    results: list[Array] = mapped(x, list(states), layer)
    return results
