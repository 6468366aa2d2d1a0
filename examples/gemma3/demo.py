"""Gemma 3 270M goes on with a few prompts, and what can be rewritten of its decode step is listed.

Run it with `python -m examples.gemma3.demo`, or `make gemma`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

import hire_rewrite as hire

from ..smollm2 import generate
from . import model, tokenizer, weights

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a lighthouse by the sea,",
    "def fibonacci(n):\n",
)
MAX_LEN = 128
ANSWER = 40  # tokens


def main() -> None:
    params, config = weights.load()
    words = tokenizer.load()

    def decode_step(params: Any, token: Any, cache: Any) -> Any:
        return model.decode_step(config, params, token, cache)

    prefill = jax.jit(functools.partial(model.prefill, config), donate_argnames="cache")
    step = jax.jit(decode_step, donate_argnames="cache")
    for prompt in PROMPTS:
        ids = words.encode(tokenizer.BOS + prompt).ids
        cache = model.init_cache(config, 1, MAX_LEN)
        logits, cache = prefill(params, jnp.array([ids], jnp.int32), cache)
        first = generate.likeliest(logits)
        tokens, _, _ = generate.greedy(step, params, cache, first, ANSWER)
        said = words.decode([int(first[0]), *tokens[0].tolist()])
        print(f"{prompt}│{said}\n")

    call = (params, jnp.zeros(1, jnp.int32), model.init_cache(config, 1, MAX_LEN))
    print(hire.transform(decode_step).plan(*call))


if __name__ == "__main__":
    main()
