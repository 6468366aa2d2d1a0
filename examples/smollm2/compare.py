"""Decode steps on the same prompt: the tokens that they choose, what they rank first, and how far
their chances of the next token differ."""

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


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
    """A step's greedy answer to a prompt.

    Attributes:
      first: the token that the prompt's prefill chose.
      tokens: i32[n], those after it, to the answer's end.
      logits: f32[n, vocab], of which each of `tokens` is the greatest.
    """

    first: int
    tokens: np.ndarray
    logits: Array

    @property
    def read(self) -> list[int]:
        """The n tokens after which there are logits."""
        return [self.first, *self.tokens[:-1].tolist()]


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """A dense step's greedy answer to a prompt, and what another step would say at each token.

    Attributes:
      first: the token that the prompt's prefill chose.
      dense: i32[n], the answer, to its end.
      rewritten: i32[n], what the other step chooses given the same tokens before.
      recall: f32[n], the part of the dense `TOP` greatest that are among the other's.
      kl: f64[n], KL(dense ‖ other) of the next token's chances, in nats.
    """

    first: int
    dense: np.ndarray
    rewritten: np.ndarray
    recall: np.ndarray
    kl: np.ndarray

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
    """Decode at most n tokens after a prompt, and have another step read them.

    Args:
      read, dense, n, end: as in `answer`.
      rewritten: the other step and the weights to call it with.
    """
    said = answer(read, dense, n, end)
    return beside(said, follow(read, rewritten, said))


def answer(
    read: Callable[[], tuple[Array, Cache]], dense: tuple[Step, Any], n: int, end: int | None
) -> Answer:
    """What a step says after a prompt.

    Args:
      read: reads the prompt; logits: [1, vocab] and a fresh cache, which the step may donate.
      dense: a step and the weights to call it with.
      n: tokens at most.
      end: the token after which nothing counts.
    """
    logits, cache = read()
    first = generate.likeliest(logits)
    step, weights = dense
    tokens, said, _ = generate.greedy(step, weights, cache, first, n, keep_logits=True)
    assert said is not None
    ends = np.flatnonzero(np.asarray(tokens[0]) == end)
    stop = int(ends[0]) + 1 if len(ends) else n
    return Answer(int(first[0]), np.asarray(tokens[0])[:stop], said[0, :stop])


def follow(read: Callable[[], tuple[Array, Cache]], other: tuple[Step, Any], said: Answer) -> Array:
    """f32[n, vocab], the logits of another step that is given the tokens of an answer."""
    (step, weights), (_, cache) = other, read()
    got = []
    for token in said.read:
        logits, cache = step(weights, jnp.array([token], jnp.int32), cache)
        got.append(logits[0])
    return jnp.stack(got)


def beside(said: Answer, logits: Array) -> Comparison:
    """An answer beside another step's logits, f32[n, vocab], given the same tokens."""
    chosen, found = map(np.asarray, _ranked(logits, said.logits))
    return Comparison(said.first, said.tokens, chosen, found, _divergence(logits, said.logits))


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


def _divergence(got: Array, expected: Array) -> np.ndarray:
    """f64[n], KL(expected ‖ got), for in float32 that of nearly the same logits is rounding."""
    p, q = (_log_softmax(np.asarray(logits, np.float64)) for logits in (expected, got))
    return np.sum(np.exp(p) * (p - q), axis=-1)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@jax.vmap
def recall(got: Array, expected: Array) -> Array:
    """The part of the `TOP` greatest of expected: [n, vocab] among those of got: f32[n]."""
    return jnp.mean(jnp.isin(lax.top_k(expected, TOP)[1], lax.top_k(got, TOP)[1]))
