"""What is made of weights layer by layer: what one needs besides is free before the next."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def map_layers(
    function: Callable[[Any, Any], Any],
    how: Any,
    arrays: Any,
    advance: Callable[[], None] = lambda: None,
) -> Any:
    """The results of a function for each layer of some arrays, stacked.

    Args:
      function: (how, the arrays of one layer) to a pytree. It is compiled once for equal `how`, if
        it is the same function each time.
      how: anything hashable.
      arrays: a pytree, all with a leading axis of layers.
      advance: called after each layer, unless the arrays are traced.

    Examples:
      >>> def scaled(how, row):
      ...     return row * how
      >>> map_layers(scaled, 2.0, jnp.array([[1.0], [3.0]])).tolist()
      [[2.0], [6.0]]
    """
    leaves = jax.tree.leaves(arrays)
    if isinstance(leaves[0], jax.core.Tracer):
        return lax.map(functools.partial(function, how), arrays)
    results = []
    for layer in range(leaves[0].shape[0]):
        results.append(jax.block_until_ready(_of_layer(function, how, arrays, layer)))
        advance()
    return results[0] if len(results) == 1 else _joined(results)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _of_layer(function: Callable[[Any, Any], Any], how: Any, arrays: Any, layer: int) -> Any:
    """The results for one layer, as of layers [1, ...], compiled once for all of a size.

    A layer is cut out here: a head's is all of its rows, and would be copied. What the compiler
    fuses is never held whole.
    """
    own = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, layer, keepdims=False), arrays)
    return jax.tree.map(lambda part: part[None], function(how, own))


@jax.jit
def _joined(parts: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
