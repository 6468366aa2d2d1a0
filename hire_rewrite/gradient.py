"""To notice that something is differentiated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

OTHER_GRADIENT = (
    'a gradient is taken in mode "hire" through {}, and is not the model\'s: what is not '
    "chosen and what is rounded has none, and a Packed is not what you train. Give "
    'transform(..., mode="exact") to differentiate, with the weights as they are'
)
"""What a user is told of a gradient through some sites."""

LOST_RULE = (
    "a gradient is taken through {}, in a function with a derivative of its own (jax.custom_vjp or "
    "jax.custom_jvp), and is that of its arithmetic instead: another body takes its place, which "
    "that derivative does not describe. To have it, differentiate the function as it was before "
    "transform, or leave these sites to no rule (path=)"
)
"""What a user is told of a gradient through some sites whose function has one of its own."""


def announcing(announce: Callable[[], None]) -> Callable[[Sequence[Any], Iterable[Any]], list[Any]]:
    """A function that returns arrays as they are, and calls `announce` where they are
    differentiated, in whatever way and however much later.

    It is called with the results of a function and what it was given: results that it was given are
    not touched, so that a loop around it still sees that it hands them on.

    Examples:
      >>> marked = announcing(lambda: print("differentiated"))
      >>> jax.grad(jax.jit(lambda x: marked([x * 2.0], [x])[0]))(3.0).item()
      differentiated
      2.0
    """

    @jax.custom_jvp
    def same(arrays: list[Any]) -> list[Any]:
        return arrays

    @same.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        announce()
        return primals[0], tangents[0]

    def mark(results: Sequence[Any], given: Iterable[Any]) -> list[Any]:
        known = set(map(id, given))
        places = [
            i
            for i, array in enumerate(results)
            if id(array) not in known and jnp.issubdtype(jnp.result_type(array), jnp.inexact)
        ]
        marked = list(results)
        for i, array in zip(places, same([results[i] for i in places]), strict=True):
            marked[i] = array
        return marked

    return mark
