"""Greedy decoding: the likeliest token, again and again.

A plain Python loop over any `step(params, token, cache) -> (logits, cache)`, jitted or not. The
loop never looks at the values, so on an accelerator steps are dispatched ahead of the device.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

Step = Callable[[Any, Array, Any], tuple[Array, Any]]


@jax.jit
def likeliest(logits: Array) -> Array:
    """i32[batch] from logits: [batch, vocab]."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def greedy(
    step: Step, params: Any, cache: Any, token: Array, n: int, keep_logits: bool = False
) -> tuple[Array, Array | None, Any]:
    """Read token: i32[batch], then each token chosen, until `n` are.

    A step of a single sequence, without the batch axis, will do as well.

    Returns tokens: i32[batch, n], the logits: [batch, n, vocab] that chose them (None unless
    `keep_logits`), and the cache, which has everything but the last token. The cache passed in
    must not be used again if `step` donates it.
    """
    tokens, kept = [], []
    for _ in range(n):
        logits, cache = step(params, token, cache)
        token = likeliest(logits)
        tokens.append(token)
        if keep_logits:
            kept.append(logits)
    return jnp.stack(tokens, axis=-1), jnp.stack(kept, axis=-2) if keep_logits else None, cache
