"""A whole answer in one compiled program: `python -m examples.smollm2.while_loop`.

`lax.while_loop` decodes until the end token or until the answer is full, and no token comes back to
Python before that. The loop is jitted with the weights as an argument: the model's params for the
dense step, a `Packed` for the rewritten one. Loop and model know nothing of the package.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

import hire_rewrite as hire

from . import generate, model, tokenizer, weights

PROMPT = "What is the capital of France?"
MAX_LEN = 256


def answer(
    step: generate.Step, end: int, n: int, weights: Any, logits: Array, cache: Any
) -> tuple[Array, Array, Any]:
    """The likeliest tokens: i32[n] after a prompt, how many of them came before the end: i32[], and
    the cache, which has read those.

    Args:
      step: a decode step, dense or rewritten.
      end: the token that ends an answer, at which the loop stops.
      weights: what the step is called with.
      logits, cache: f32[1, vocab] after the prompt, and what was remembered of it.
    """

    def unfinished(carry: tuple[Array, Array, Array, Any]) -> Array:
        token, count, _, _ = carry
        return (token[0] != end) & (count < n)

    def more(carry: tuple[Array, Array, Array, Any]) -> tuple[Array, Array, Array, Any]:
        token, count, tokens, cache = carry
        tokens = tokens.at[count].set(token[0])
        logits, cache = step(weights, token, cache)
        return generate.likeliest(logits), count + 1, tokens, cache

    start = (generate.likeliest(logits), jnp.int32(0), jnp.full(n, end, jnp.int32), cache)
    _, count, tokens, cache = lax.while_loop(unfinished, more, start)
    return tokens, count, cache


def main(n: int = 40) -> tuple[str, str]:
    """What both say, dense and rewritten, in at most n tokens."""
    params, config = weights.load()
    words = tokenizer.load()
    (end,) = words.encode(tokenizer.END).ids
    decode_step = functools.partial(model.decode_step, config)
    step = hire.transform(decode_step)

    empty = model.init_cache(config, 1, MAX_LEN)
    packed = step.pack(params, jnp.zeros(1, jnp.int32), empty)
    prompt = jnp.array([words.encode(tokenizer.chat(PROMPT)).ids])
    prefill = jax.jit(functools.partial(model.prefill, config))

    said = []
    for function, held in ((decode_step, params), (step, packed)):
        logits, cache = prefill(params, prompt, empty)
        loop = jax.jit(functools.partial(answer, function, end, n), donate_argnames="cache")
        tokens, count, _ = loop(held, logits, cache)
        said.append(words.decode(tokens[: int(count)].tolist()))
        print(f"{type(held).__name__:7}{int(count):3} tokens: {said[-1]}")
    return said[0], said[1]


if __name__ == "__main__":
    main()
