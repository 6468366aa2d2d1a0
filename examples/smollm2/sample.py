"""The next token drawn by its chances, of one sequence or of many."""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from .generate import likeliest

TOP = 64
"""Tokens are drawn among the likeliest 64: their logits are exact in a head that is rewritten with
`Head(k=64)`, the default."""


@functools.partial(jax.jit, static_argnames=("temperature", "top_p"))
def sample(
    logits: Array, key: Array, place: Array | int, temperature: float = 0.0, top_p: float = 1.0
) -> Array:
    """i32[batch] from logits: [batch, vocab], drawn with the key for this place in the text.

    Args:
      temperature: what logits are divided by; 0 for the likeliest token.
      top_p: only the likeliest tokens are drawn, as few as have this chance together.
    """
    if temperature == 0:
        return likeliest(logits)
    best, tokens = lax.top_k(logits, TOP)
    chances = jax.nn.softmax(best / temperature, axis=-1)
    before = jnp.cumsum(chances, axis=-1) - chances
    scores = jnp.where(before < top_p, jnp.log(chances), -jnp.inf)
    drawn = jax.random.categorical(jax.random.fold_in(key, place), scores)
    return jnp.take_along_axis(tokens, drawn[..., None], axis=-1)[..., 0]
