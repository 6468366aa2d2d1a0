"""Translations from a step: greedy, or by beam search as Marian does it.

Both are compiled whole, as one loop over any `step(params, token, state) -> (logits, state)`:
`model.decode_step` with its config bound, or what `hire.transform` makes of it, with its `Packed`
as params. Bind once and keep the step: a new function is compiled anew.

A translation ends with END and has at most 2.5 times as many tokens as its sentence, or is cut off.
UNKNOWN is never chosen. What follows END in a row of tokens is END.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from .model import State
from .tokenizer import END, UNKNOWN

Step = Callable[[Any, Array, State], tuple[Array, State]]

LONGEST = 2.5  # tokens of a translation for each of its sentence, END among them


@functools.partial(jax.jit, static_argnames=("step", "steps"))
def greedy(step: Step, params: Any, state: State, steps: int | None = None) -> Array:
    """The likeliest token, again and again: tokens i32[batch, n], from `model.start`'s state.

    n is 2.5 times the padded length of the sentences, or `steps`.
    """
    n, limits = _limits(state, steps)
    batch = limits.shape[0]

    def goes_on(carry: tuple[Array, Array, Array, Array, Any]) -> Array:
        t, _, ended, _, _ = carry
        return (t < n) & ~jnp.all(ended)

    def turn(carry: tuple[Array, Array, Array, Array, Any]) -> Any:
        t, token, ended, tokens, state = carry
        logits, state = step(params, token, state)
        token = jnp.argmax(_allowed(logits), axis=-1).astype(jnp.int32)
        token = jnp.where(ended, END, token)
        tokens = tokens.at[:, t].set(token)
        return t + 1, token, ended | (token == END) | (t + 1 >= limits), tokens, state

    none = jnp.full((batch, n), END, jnp.int32)
    begin = (jnp.int32(0), none[:, 0], jnp.zeros(batch, bool), none, state)
    return lax.while_loop(goes_on, turn, begin)[3]


@functools.partial(jax.jit, static_argnames=("step", "beam", "normalize", "steps"))
def beam_search(
    step: Step,
    params: Any,
    state: State,
    beam: int = 4,
    normalize: float = 1.0,
    steps: int | None = None,
) -> tuple[Array, Array]:
    """(tokens i32[batch, n], scores f32[batch]): the best translation of each that the search ends.

    Of each sentence `beam` unfinished translations are held. All are continued with all tokens, and
    the likeliest are kept. Those that end leave the beam, which is narrower by one from then on; no
    more are looked for when none is left. The score is the sum of log probabilities over the
    length, END included, to the power of `normalize`: Marian's option of this name, 1 in the
    settings that the models come with.
    """
    n, limits = _limits(state, steps)
    batch = limits.shape[0]
    # The sentences' rows follow each other, `beam` of each; all share its keys and values.
    state = {name: part if name == "pos" else _repeat(part, beam) for name, part in state.items()}

    def goes_on(carry: tuple[Array, dict[str, Array], Any]) -> Array:
        t, beams, _ = carry
        return (t < n) & jnp.any(beams["scores"] > -jnp.inf)

    def turn(carry: tuple[Array, dict[str, Array], Any]) -> Any:
        t, beams, state = carry
        last = jnp.where(t > 0, beams["tokens"][:, :, t - 1], END)
        logits, state = step(params, last.reshape(-1), state)
        chances = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        # The likeliest of a sentence are among the likeliest of its rows.
        each, tokens = lax.top_k(_allowed(chances), beam)
        each = beams["scores"][:, :, None] + each.reshape(batch, beam, beam)
        scores, picked = lax.top_k(each.reshape(batch, -1), beam)
        scores = jnp.where(jnp.arange(beam) < beams["width"][:, None], scores, -jnp.inf)
        token = jnp.take_along_axis(tokens.reshape(batch, -1), picked, axis=1)
        parent = picked // beam

        history = jnp.take_along_axis(beams["tokens"], parent[:, :, None], axis=1)
        history = history.at[:, :, t].set(token)
        ends = (token == END) | (t + 1 >= limits)[:, None]
        final = jnp.where(ends, scores / (t + 1.0) ** normalize, -jnp.inf)
        best = jnp.argmax(final, axis=1)
        score = jnp.take_along_axis(final, best[:, None], axis=1)[:, 0]
        better = score > beams["best_score"]
        theirs = jnp.take_along_axis(history, best[:, None, None], axis=1)[:, 0]

        rows = (jnp.arange(batch)[:, None] * beam + parent).reshape(-1)
        state = {**state, "cells": jax.tree.map(lambda cell: cell[rows], state["cells"])}
        scores = jnp.where(ends, -jnp.inf, scores)
        beams = {
            "scores": scores,
            "width": jnp.sum(scores > -jnp.inf, axis=1),
            "tokens": history,
            "best": jnp.where(better[:, None], theirs, beams["best"]),
            "best_score": jnp.where(better, score, beams["best_score"]),
        }
        return t + 1, beams, state

    none = jnp.full((batch, beam, n), END, jnp.int32)
    begin = {
        # Before the first token all rows are the same translation, so only one is continued.
        "scores": jnp.full((batch, beam), -jnp.inf).at[:, 0].set(0.0),
        "width": jnp.full(batch, beam),
        "tokens": none,
        "best": none[:, 0],
        "best_score": jnp.full(batch, -jnp.inf),
    }
    _, beams, _ = lax.while_loop(goes_on, turn, (jnp.int32(0), begin, state))
    return beams["best"], beams["best_score"]


def _limits(state: State, steps: int | None) -> tuple[int, Array]:
    """(n, i32[batch]): the most tokens of any translation, and of each."""
    n = math.ceil(LONGEST * state["mask"].shape[1]) if steps is None else steps
    limits = jnp.ceil(LONGEST * jnp.sum(state["mask"], axis=1)).astype(jnp.int32)
    return n, jnp.minimum(limits, n)


def _allowed(scores: Array) -> Array:
    """scores: [rows, vocab], without UNKNOWN."""
    return scores.at[:, UNKNOWN].set(-jnp.inf)


def _repeat(part: Any, beam: int) -> Any:
    """Every row `beam` times, one after the other."""
    return jax.tree.map(lambda x: jnp.repeat(x, beam, axis=0), part)
