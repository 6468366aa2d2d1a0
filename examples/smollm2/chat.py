"""Talk to SmolLM2 in the terminal: `python -m examples.smollm2.chat`. An empty line ends it.

Everything read and said stays in one cache, so a turn costs its own tokens only. Prompts are
padded to a multiple of 64 tokens: a handful of compiled programs serve prompts of every length.
"""

import contextlib
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from tokenizers.decoders import DecodeStream

from . import generate, model, tokenizer, weights

MAX_LEN = 2048  # tokens the conversation may have
ROOM = 256  # tokens an answer may have
PADDED_TO = 64


def main() -> None:
    params, config = weights.load()
    words = tokenizer.load()
    end = words.token_to_id(tokenizer.END)
    prefill = jax.jit(functools.partial(model.prefill, config), donate_argnames="cache")
    step = jax.jit(functools.partial(model.decode_step, config), donate_argnames="cache")
    cache = model.init_cache(config, batch=1, max_len=MAX_LEN)

    for turn, prompt in enumerate(_prompts()):
        ids = words.encode(tokenizer.chat(prompt, first=turn == 0)).ids
        padded = ids + [end] * (-len(ids) % PADDED_TO)
        if int(cache["pos"]) + len(padded) + ROOM > MAX_LEN:
            print("(the conversation is too long to go on)")
            return
        logits, cache = prefill(params, jnp.array([padded], jnp.int32), cache, length=len(ids))
        token = generate.likeliest(logits)
        text = DecodeStream(skip_special_tokens=True)
        for _ in range(ROOM):
            if int(token[0]) == end:
                break
            print(text.step(words, int(token[0])) or "", end="", flush=True)
            logits, cache = step(params, token, cache)
            token = generate.likeliest(logits)
        print()


def _prompts() -> Iterator[str]:
    with contextlib.suppress(EOFError):
        while prompt := input("> ").strip():
            yield prompt


if __name__ == "__main__":
    main()
