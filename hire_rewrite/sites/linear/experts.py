"""Linear layers with a weight for each expert: the product of each with its own inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hire_rewrite.patterns.linear import Linear
from hire_rewrite.patterns.region import from_tokens, to_tokens, without_axis


def on_tokens(
    linear: Linear, function: Callable[[Any, Any], tuple[Sequence[Any], Any]], x: Any, layer: Any
) -> tuple[list[Any], Any]:
    """A function of a layer's tokens, laid out as the layer's input and results are.

    Args:
      function: (tokens: [tokens, d], layer: i32[]) to results [tokens, n] and a report. Layers are
        those of packed arrays, where a layer's experts follow each other.
      x: the layer's input.
      layer: i32[], the number of the layer.

    Returns:
      The results as the layer's own. The reports of experts are stacked.
    """
    axes = linear.expert_axes()
    if axes is None or axes[0] is None:
        results, report = function(to_tokens(x, linear.x_axes), layer)
        return [from_tokens(y, linear.out.shape, linear.out_axes) for y in results], report
    x_axis, _, y_axis = axes
    experts = linear.experts()
    shape = [size for i, size in enumerate(linear.out.shape) if i != y_axis]
    x_axes, y_axes = without_axis(linear.x_axes, x_axis), without_axis(linear.out_axes, y_axis)

    def of_expert(expert: Any, x: Any) -> Any:
        results, report = function(to_tokens(x, x_axes), layer * experts + expert)
        return [from_tokens(y, shape, y_axes) for y in results], report

    run: Any = jax.vmap(of_expert, (0, x_axis), (y_axis, 0))
    results, report = run(jnp.arange(experts), x)
    return results, report
