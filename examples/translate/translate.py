"""From sentences to sentences: what lies before a search and after it."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax import Array
from tokenizers import Tokenizer

from . import model, search, tokenizer
from .model import Config, Params, State


def begin(
    config: Config, params: Params, words: Tokenizer, sentences: Sequence[str], multiple: int = 8
) -> State:
    """The decoder's state before the first token of the translations of `sentences`.

    The longest of them, padded to a multiple of so many tokens, says how many are read of each.
    """
    return _begin(config, params, *tokenizer.encode(words, sentences, multiple))


def translate(
    step: search.Step, params: Any, words: Tokenizer, state: State, beam: int | None = None
) -> list[str]:
    """A translation of each sentence that `begin` read, greedy or with a beam.

    `params` are the step's own: those of the model, or a `Packed` of `hire.transform(step)`.
    """
    if beam is None:
        return tokenizer.decode(words, search.greedy(step, params, state))
    return tokenizer.decode(words, search.beam_search(step, params, state, beam)[0])


@functools.partial(jax.jit, static_argnames="config")
def _begin(config: Config, params: Params, ids: Array, mask: Array) -> State:
    return model.start(config, params, model.encode(config, params, ids, mask), mask)
