"""Experts side by side: the block of each on its own tokens, all at once.

In a mixture of experts with dense dispatch every expert has as many tokens, along an axis of the
traced values. The block of one expert is mapped over that axis, with the expert's own rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hire_rewrite.sites.ffn.match import FFNMatch
from hire_rewrite.sites.layout import to_tokens

Block = Callable[[Any, Any, Any, Callable[..., Any]], Any]
"""(x: [tokens, d_in], state, layer: i32[], activation) to [tokens, d_out], or that and a report."""


def side_by_side(
    match: FFNMatch,
    block: Block,
    functions: dict[Hashable, Callable[..., Any]],
    key: Hashable,
    *,
    reports: bool,
) -> Callable[[Sequence[Any], Any, Any], Any]:
    """`block` for all experts of a match; `functions` remembers it under `key`.

    With `reports` the block returns a report beside its result, and so does the function: one for
    each expert, stacked.
    """
    region, experts = match.region, match.experts
    first = region.projections[0]
    ins_axes = first.linear.expert_axes(first.window)
    out_axes = match.down.expert_axes()
    assert ins_axes is not None
    assert out_axes is not None
    shape = first.linear.out.shape
    fixed = (first.window.axis, *first.window.picked)
    kept = [axis for axis in range(len(shape)) if axis not in fixed]
    others, place = [shape[axis] for axis in kept], kept.index(ins_axes[2])
    own_shape = [size for i, size in enumerate(others) if i != place]

    def spread(rows: Any) -> Any:
        """[own tokens, n] of one expert, repeated for all of them, in the region's order."""
        tiled = jnp.broadcast_to(
            rows.reshape(*own_shape, -1), (experts, *own_shape, rows.shape[-1])
        )
        return jnp.moveaxis(tiled, 0, place).reshape(-1, rows.shape[-1])

    def own(rows: Any, expert: Any) -> Any:
        """The tokens of one expert, [own tokens, n], of those of all."""
        split = jnp.moveaxis(rows.reshape(*others, -1), place, 0)
        one = lax.dynamic_index_in_dim(split, expert, keepdims=False)
        return one.reshape(-1, rows.shape[-1])

    def hire_ffn(x: Any, sides: Sequence[Any], state: Any, layer: Any) -> Any:
        known = dict(zip(region.sides, sides, strict=True))

        def one(expert: Any, x: Any) -> Any:
            def activation(pre: Sequence[Any], vectors: Sequence[Any]) -> Any:
                return own(region.run([spread(rows) for rows in pre], vectors, known), expert)

            return block(x, state, layer * experts + expert, activation)

        return jax.vmap(one)(jnp.arange(experts), x)

    jitted = functions.setdefault((key, place, experts), jax.jit(hire_ffn))

    def run(ins: Sequence[Any], layer: Any, state: Any) -> Any:
        x, *sides = ins
        found = jitted(_by_expert(x, ins_axes[0], match.x_axes, experts), sides, state, layer)
        y, report = found if reports else (found, None)
        out = match.down.out
        width = [out.shape[axis] for axis in match.down.out_axes]
        rest = [s for i, s in enumerate(out.shape) if i not in (out_axes[2], *match.down.out_axes)]
        y = y.reshape(experts, *rest, *width)
        last = range(y.ndim - len(width), y.ndim)
        results = [jnp.moveaxis(y, (0, *last), (out_axes[2], *match.down.out_axes))]
        return (results, report) if reports else results

    return run


def _by_expert(x: Any, axis: int | None, contracted: Sequence[int], experts: int) -> Any:
    """x as [experts, tokens, d]; the same for all experts if it has no axis of theirs."""
    if axis is None:
        rows = to_tokens(x, contracted)
        return jnp.broadcast_to(rows, (experts, *rows.shape))
    size = math.prod(x.shape[i] for i in contracted)
    last = range(x.ndim - len(contracted), x.ndim)
    return jnp.moveaxis(x, (axis, *contracted), (0, *last)).reshape(experts, -1, size)
