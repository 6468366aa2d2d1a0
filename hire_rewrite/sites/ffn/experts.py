"""Experts side by side: the block of each on its own tokens, all at once.

In a mixture of experts with dense dispatch every expert has as many tokens, along an axis of the
traced values. The block of one expert is mapped over that axis, with the expert's own rows.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hire_rewrite.patterns.region import from_tokens, to_tokens, without_axis
from hire_rewrite.sites.ffn.match import FFNMatch
from hire_rewrite.sites.kind import Functions
from hire_rewrite.sites.replacement import Run


def side_by_side(
    match: FFNMatch,
    block: Callable[..., tuple[Any, Any]],
    functions: Functions,
    key: Hashable,
) -> Run:
    """`block` for all experts of a match; `functions` remembers it under `key`.

    Args:
      block: (x: [tokens, d_in], state, layer: i32[], activation) to [tokens, d_out] and a report.
        Those of all experts are stacked.
    """
    region, experts, down = match.region, match.experts, match.down
    first = region.projections[0]
    ins_axes, out_axes = first.linear.expert_axes(first.window), down.expert_axes()
    assert ins_axes is not None
    assert out_axes is not None
    x_axis, y_axis = ins_axes[0], out_axes[2]
    y_shape = [size for i, size in enumerate(down.out.shape) if i != y_axis]
    # The region runs on the tokens of all experts, in the order of these axes.
    shape = first.linear.out.shape
    token_axes = [axis for axis in range(len(shape)) if axis not in first.window.axes]
    sizes, place = [shape[axis] for axis in token_axes], token_axes.index(ins_axes[2])
    expert_sizes = [size for i, size in enumerate(sizes) if i != place]

    def repeated(rows: Any) -> Any:
        """[tokens of an expert, n], as if all experts had them."""
        tokens = jnp.expand_dims(rows.reshape(*expert_sizes, -1), place)
        return jnp.broadcast_to(tokens, (*sizes, rows.shape[-1])).reshape(-1, rows.shape[-1])

    def hire_ffn(x: Any, sides: Sequence[Any], state: Any, layer: Any) -> Any:
        known = dict(zip(region.sides, sides, strict=True))

        def of_expert(expert: Any, x: Any) -> Any:
            def activation(pre: Sequence[Any], vectors: Sequence[Any]) -> Any:
                hidden = region.run(list(map(repeated, pre)), vectors, known)
                split = hidden.reshape(*sizes, -1)
                tokens = lax.dynamic_index_in_dim(split, expert, place, keepdims=False)
                return tokens.reshape(-1, hidden.shape[-1])

            tokens = to_tokens(x, without_axis(match.x_axes, x_axis))
            y, report = block(tokens, state, layer * experts + expert, activation=activation)
            return from_tokens(y, y_shape, without_axis(down.out_axes, y_axis)), report

        return jax.vmap(of_expert, (0, x_axis), (y_axis, 0))(jnp.arange(experts), x)

    axes = (ins_axes, out_axes, match.x_axes, down.out_axes, down.out.shape)
    jitted = functions.setdefault((key, axes), jax.jit(hire_ffn))

    def run(ins: Sequence[Any], layer: Any, state: Any) -> Any:
        x, *sides = ins
        y, report = jitted(x, sides, state, layer)
        return [y], report

    return run
