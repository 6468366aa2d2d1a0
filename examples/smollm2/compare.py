"""Two decode steps on the same prompt: the tokens that they choose, and what they rank first."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..layers import Cache, CacheSizes, init_cache
from . import generate
from .generate import Step

PADDED_TO = 64  # prompts of every length then share a few compiled programs
TOP = 64  # how many of the greatest logits are compared


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A dense step's greedy answer to a prompt, and what a rewritten step would say at each token.

    Attributes:
      first: the token that the prompt's prefill chose.
      dense: i32[n], the answer, to its end.
      rewritten: i32[n], what the rewritten step chooses given the same tokens before.
      recall: f32[n], the part of the dense `TOP` greatest that are among the rewritten ones.
    """

    first: int
    dense: np.ndarray
    rewritten: np.ndarray
    recall: np.ndarray

    @property
    def same(self) -> int:
        """At how many tokens both choose the same."""
        return int(np.sum(self.rewritten == self.dense))


def compare(
    read: Callable[[], tuple[Array, Cache]],
    dense: tuple[Step, Any],
    rewritten: tuple[Step, Any],
    n: int,
    end: int | None,
) -> Comparison:
    """Decode at most n tokens after a prompt.

    Args:
      read: reads the prompt; logits: [1, vocab] and a fresh cache, which the steps may donate.
      dense, rewritten: each a step and the weights to call it with.
      end: the token after which nothing counts.
    """
    logits, cache = read()
    first = generate.likeliest(logits)
    step, weights = dense
    tokens, expected, _ = generate.greedy(step, weights, cache, first, n, keep_logits=True)
    assert expected is not None
    step, weights = rewritten
    got, cache = [], read()[1]
    for token in [first, *tokens.T[:-1]]:
        logits, cache = step(weights, token, cache)
        got.append(logits[0])
    chosen, found = _ranked(jnp.stack(got), expected[0])
    ends = np.flatnonzero(np.asarray(tokens[0]) == end)
    stop = int(ends[0]) + 1 if len(ends) else n
    return Comparison(
        int(first[0]),
        *(np.asarray(values)[:stop] for values in (tokens[0], chosen, found)),
    )


def reader(
    prefill: Callable[..., tuple[Array, Cache]],
    params: Any,
    config: CacheSizes,
    prompt: list[int],
    end: int | None,
    max_len: int,
) -> Callable[[], tuple[Array, Cache]]:
    """Reads a prompt, padded with `end`, into a fresh cache of `max_len` at every call."""
    padded = prompt + [end or 0] * (-len(prompt) % PADDED_TO)

    def read() -> tuple[Array, Cache]:
        cache = init_cache(config, 1, max_len)
        return prefill(params, jnp.array([padded], jnp.int32), cache, length=len(prompt))

    return read


@jax.jit
def _ranked(got: Array, expected: Array) -> tuple[Array, Array]:
    """i32[n], the greatest of got: [n, vocab], and f32[n], recall of the greatest of `expected`."""
    return jnp.argmax(got, axis=-1), recall(got, expected)


@jax.vmap
def recall(got: Array, expected: Array) -> Array:
    """The part of the `TOP` greatest of expected: [n, vocab] among those of got: f32[n]."""
    return jnp.mean(jnp.isin(lax.top_k(expected, TOP)[1], lax.top_k(got, TOP)[1]))
