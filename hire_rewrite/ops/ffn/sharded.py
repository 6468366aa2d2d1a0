"""A feed-forward block whose rows are sharded over the devices of a mesh.

Each device guesses, chooses and gathers among its own rows, all at the same time, inside a
`shard_map`. Tokens are sharded over the other axes of the mesh (a data-parallel batch is so
already), so that no device computes what another one does. The results of a block are added up:
that is the all-reduce that the dense block has too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

from hire_rewrite.ops.ffn.block import Activation, FFNSpec, FFNState
from hire_rewrite.ops.ffn.ffn import counted_ffn
from hire_rewrite.ops.predictors import Predictor
from hire_rewrite.ops.predictors.sharded import fitted_specs
from hire_rewrite.ops.quality import Choice, Comparison, Measured, Reading
from hire_rewrite.ops.usage import tally
from hire_rewrite.sharding.rows import RowSharding

__all__ = ["compared", "ffn_specs", "of_some", "on_shards", "over_tokens", "sharded_ffn", "summed"]


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
) -> tuple[Array, Any]:
    """`hire_ffn` on arrays that are sharded as `ffn_specs` says, a shard for each device.

    Args:
      together: keep the tokens together, for the activation knows something of each.
      counted: return the `tally` of each device, u32[devices, 8]; None otherwise.
    """
    share = None if budget is None else -(-budget // spec.num_shards)

    def own(x: Array, state: FFNState, layer: Array, activation: Activation) -> tuple[Array, Any]:
        settings: Any = {"activation": activation, "predictor": predictor, "budget": share}
        y, usage = counted_ffn(x, state, layer, spec=spec.shard, **settings)
        return y, tally(x.shape[0], usage) if counted else None

    return on_shards(
        summed(own, sharding.axes),
        x,
        state,
        layer,
        activation=activation,
        sharding=sharding,
        together=together,
        specs=ffn_specs(state, spec, predictor, sharding),
        by_device=counted,
    )


def on_shards(
    block: Callable[..., tuple[Array, Any]],
    x: Array,
    state: Any,
    layer: Array | int,
    *,
    activation: Activation,
    sharding: RowSharding,
    together: bool,
    specs: Any = None,
    by_device: bool = False,
) -> tuple[Array, Any]:
    """A block on each device, of its own arrays.

    Args:
      block: of one device (x: [tokens, d_in], state, layer, activation) to what all devices have
        together (see `summed`), [tokens, d_out], and a report, a pytree of sums over tokens.
      together: keep the tokens together, for the activation knows something of each.
      specs: how the arrays are sharded; None for the devices' own in a row on the leading axis.
      by_device: return the report of each device, on a leading axis, and not of all tokens.
    """
    count = x.shape[0]
    some = () if together else sharding.token_axes(count)

    def on_shard(x: Array, state: Any, layer: Array) -> tuple[Array, Any]:
        y, report = block(x, state, layer, activation=of_some(activation, count))
        if by_device:
            return y, jax.tree.map(lambda leaf: leaf[None], report)
        return y, over_tokens(report, some)

    tokens = PartitionSpec(some)
    devices = PartitionSpec((*sharding.axes, *some)) if by_device else PartitionSpec()
    specs = PartitionSpec(sharding.axes) if specs is None else specs
    mapped = sharding.map(on_shard, (tokens, specs, PartitionSpec()), (tokens, devices))
    results: tuple[Array, Any] = mapped(x, state, layer)
    return results


def of_some(activation: Activation, count: int) -> Activation:
    """An activation that is written for so many tokens, of fewer."""

    def on_some(pre: tuple[Array, ...], vectors: tuple[Array, ...]) -> Array:
        some = pre[0].shape[0]
        if some == count:
            return activation(pre, vectors)
        missing = ((0, count - some), (0, 0))
        return activation(tuple(jnp.pad(array, missing) for array in pre), vectors)[:some]

    return on_some


def over_tokens(report: Any, axes: Sequence[str]) -> Any:
    """A report of all tokens, which are sharded over axes of the mesh."""
    return jax.tree.map(lambda leaf: lax.psum(leaf, axes), report) if axes else report


def summed(
    block: Callable[..., tuple[Array, Any]], axes: Sequence[str]
) -> Callable[..., tuple[Array, Any]]:
    """A block of some neurons, which reports something, as that of all neurons, which are sharded
    over axes of the mesh; each device reports its own."""
    if not axes:
        return block

    def run(*args: Any, **settings: Any) -> tuple[Array, Any]:
        y, report = block(*args, **settings)
        return lax.psum(y, axes), report

    return run


def compared(measured: Callable[..., Measured], axes: Sequence[str]) -> Callable[..., Measured]:
    """A block of some neurons that is measured as that of all (see `summed`). The units of all
    devices are compared together; a token reads all where a device reads all of its own."""
    if not axes:
        return measured

    def add(values: Array) -> Array:
        return lax.psum(values, axes)

    def join(units: Array) -> Array:
        return lax.all_gather(units, axes, axis=1, tiled=True)

    def run(*args: Any, **settings: Any) -> Measured:
        own = measured(*args, **settings)
        comparison, choice, reading = own.comparison, own.comparison.choice, own.comparison.reading
        if choice is not None:
            units = (choice.rank, choice.guessed, choice.candidates, choice.mass)
            rank, guessed, candidates, mass = map(join, units)
            k = choice.k * (rank.shape[1] // choice.rank.shape[1])
            choice = Choice(rank, guessed, candidates, k, mass, choice.nothing)
        if reading is not None:
            whole = add(reading.whole.astype(jnp.int32)) > 0
            reading = Reading(join(reading.wanted), join(reading.read), whole)
        dense, exact, rewritten = map(
            add, (comparison.dense, comparison.exact, comparison.rewritten)
        )
        results = Comparison(dense, exact, rewritten, choice, None, reading)
        return Measured(add(own.exact), add(own.rewritten), results)

    return run


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
