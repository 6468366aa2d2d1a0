"""Experts side by side: the block of each on its own tokens, all at once.

In a mixture of experts with dense dispatch every expert has as many tokens, along an axis of the
traced values. The block of one expert is mapped over that axis, with the expert's own rows. On a
mesh each device has some of the experts, or some neurons of each, or some neurons of some.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from hire_rewrite.ops.ffn.sharded import of_some, over_tokens
from hire_rewrite.patterns.region import from_tokens, to_tokens, without_axis
from hire_rewrite.sharding.rows import RowSharding
from hire_rewrite.sites.ffn.match import FFNMatch
from hire_rewrite.sites.kind import Functions
from hire_rewrite.sites.replacement import Run


def side_by_side(
    match: FFNMatch,
    block: Callable[..., tuple[Any, Any]],
    functions: Functions,
    key: Hashable,
    sharding: RowSharding | None = None,
    by_device: bool = False,
) -> Run:
    """`block` for all experts of a match; `functions` remembers it under `key`.

    Args:
      block: (x: [tokens, d_in], state, layer: i32[], activation) to [tokens, d_out] and a report.
        Those of all experts are stacked.
      sharding: over which devices the arrays are, each device's own in a row; None for one device.
      by_device: whether devices that have parts of an expert, or some of its tokens, report each
        for itself, on an axis behind that of experts.
    """
    region, experts, down = match.region, match.experts, match.down
    first = region.projections[0]
    ins_axes, out_axes = first.linear.expert_axes(first.window), down.expert_axes()
    assert ins_axes is not None
    assert out_axes is not None
    x_axis, y_axis = ins_axes[0], out_axes[2]
    # The region runs on the tokens of all experts, in the order of these axes.
    shape = first.linear.out.shape
    token_axes = [axis for axis in range(len(shape)) if axis not in first.window.axes]
    sizes, place = [shape[axis] for axis in token_axes], token_axes.index(ins_axes[2])
    expert_sizes = [size for i, size in enumerate(sizes) if i != place]

    def repeated(rows: Any) -> Any:
        """[tokens of an expert, n], as if all experts had them."""
        tokens = jnp.expand_dims(rows.reshape(*expert_sizes, -1), place)
        return jnp.broadcast_to(tokens, (*sizes, rows.shape[-1])).reshape(-1, rows.shape[-1])

    def of_experts(x: Any, sides: Sequence[Any], state: Any, layer: Any, start: Any) -> Any:
        """The block of a device's experts, of which `start` is the first."""
        known = dict(zip(region.sides, sides, strict=True))
        count = experts if sharding is None else experts // sharding.expert_shards
        shape = list(down.out.shape)
        for mine, its in _same_tokens(match, x_axis, y_axis):
            shape[its] = x.shape[mine]  # a device may have some of the tokens
        y_shape = [size for axis, size in enumerate(shape) if axis != y_axis]

        def of_expert(number: Any, x: Any) -> Any:
            def activation(pre: Sequence[Any], vectors: Sequence[Any]) -> Any:
                hidden = region.run(list(map(repeated, pre)), vectors, known)
                split = hidden.reshape(*sizes, -1)
                tokens = lax.dynamic_index_in_dim(split, start + number, place, keepdims=False)
                return tokens.reshape(-1, hidden.shape[-1])

            tokens = to_tokens(x, without_axis(match.x_axes, x_axis))
            some = of_some(activation, math.prod(expert_sizes))
            y, report = block(tokens, state, layer * count + number, activation=some)
            return from_tokens(y, y_shape, without_axis(down.out_axes, y_axis)), report

        return jax.vmap(of_expert, (0, x_axis), (y_axis, 0))(jnp.arange(count), x)

    def hire_ffn(x: Any, sides: Sequence[Any], state: Any, layer: Any) -> Any:
        if sharding is None:
            return of_experts(x, sides, state, layer, 0)
        mapped = _on_devices(of_experts, match, sharding, x_axis, y_axis, by_device)
        return mapped(x, sides, state, layer)

    axes = (ins_axes, out_axes, match.x_axes, down.out_axes, down.out.shape)
    jitted = functions.setdefault((key, axes), jax.jit(hire_ffn))

    def run(ins: Sequence[Any], layer: Any, state: Any) -> Any:
        x, *sides = ins
        y, report = jitted(x, sides, state, layer)
        return [y], report

    return run


def _on_devices(
    of_experts: Callable[..., Any],
    match: FFNMatch,
    sharding: RowSharding,
    x_axis: int | None,
    y_axis: int,
    by_device: bool,
) -> Callable[..., Any]:
    """`of_experts` on each device, of the tokens of its own experts: where experts are sharded no
    token goes to another device. Tokens are sharded over the other axes of the mesh."""
    down, experts, some = match.down, sharding.experts, tuple[str, ...]()
    x_specs: list[Any] = [None] * len(match.x.shape)
    y_specs: list[Any] = [None] * len(down.out.shape)
    if x_axis is not None:
        x_specs[x_axis] = experts
    y_specs[y_axis] = experts
    if not match.region.sides:
        for mine, its in _same_tokens(match, x_axis, y_axis)[:1]:
            some = sharding.token_axes(match.x.shape[mine])
            x_specs[mine] = y_specs[its] = some

    def on_device(x: Any, sides: Sequence[Any], state: Any, layer: Any) -> Any:
        count = match.experts // sharding.expert_shards
        start = lax.axis_index(experts) * count if experts else 0
        y, report = of_experts(x, sides, state, layer, start)
        if by_device:
            return y, jax.tree.map(lambda leaf: leaf[:, None], report)
        return y, over_tokens(report, some)

    reports = PartitionSpec(experts)
    if by_device:
        reports = PartitionSpec(experts, (*sharding.rows, *some))
    arrays, one = PartitionSpec(sharding.axes), PartitionSpec()
    ins = PartitionSpec(*x_specs), one, arrays, one
    outs = PartitionSpec(*y_specs), reports
    mapped: Callable[..., Any] = sharding.map(on_device, ins, outs)
    return mapped


def _same_tokens(match: FFNMatch, x_axis: int | None, y_axis: int) -> list[tuple[int, int]]:
    """The axes of tokens of a block's input and of its result; none where those are not alike."""
    x, y = match.x.shape, match.down.out.shape
    ins = [axis for axis in range(len(x)) if axis not in match.x_axes and axis != x_axis]
    outs = [axis for axis in range(len(y)) if axis not in match.down.out_axes and axis != y_axis]
    alike = [x[axis] for axis in ins] == [y[axis] for axis in outs]
    return list(zip(ins, outs, strict=True)) if alike else []
