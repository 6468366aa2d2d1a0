"""Talk to SmolLM2 in the terminal: `python -m examples.smollm2.chat`. An empty line ends it.

Everything read and said stays in one cache, so a turn costs its own tokens only. Prompts are
padded to a multiple of 64 tokens: a handful of compiled programs serve prompts of every length.

The model is rewritten without a rule, so that it computes with the same numbers in fewer bytes;
prompts are read and tokens decoded with the same packed weights. `--dense` takes the model as it
is, and `/dense` and `/rewritten` change over between two turns: what is remembered serves both.
"""

import argparse
import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

import hire_rewrite as hire

from . import model, tokenizer, weights
from .sample import sample

MAX_LEN = 2048  # tokens the conversation may have
PADDED_TO = 64
FORMS = ("dense", "rewritten")


@dataclasses.dataclass(frozen=True, eq=False)
class Form:
    """The model, dense or rewritten: compiled functions, and the weights to call them with."""

    name: str
    prefill: Callable[..., Any]
    step: Callable[..., Any]
    weights: Any


def load(name: str, params: model.Params, config: model.Config) -> Form:
    """A form of the model. Its step is compiled here, so that no answer waits for that."""
    prefill: Any = functools.partial(model.prefill, config)
    step: Any = functools.partial(model.decode_step, config)
    call = jnp.zeros(1, jnp.int32), model.init_cache(config, 1, MAX_LEN)
    held: Any = params
    if name == "rewritten":
        prefill, step = hire.transform(prefill), hire.transform(step)
        held = step.pack(params, *call)
    compiled = jax.jit(step, donate_argnames="cache").lower(held, *call).compile()
    return Form(name, jax.jit(prefill, donate_argnames="cache"), compiled, held)


def main(argv: Sequence[str] | None = None) -> None:
    given = _given(argv)
    params, config = weights.load()
    words = tokenizer.load()
    choose = functools.partial(
        sample, key=jax.random.key(given.seed), temperature=given.temperature, top_p=given.top_p
    )
    form_of = functools.cache(lambda name: load(name, params, config))
    form = form_of("dense" if given.dense else "rewritten")
    cache = model.init_cache(config, batch=1, max_len=MAX_LEN)

    for prompt in _prompts():
        if prompt.startswith("/"):
            if prompt[1:] in FORMS:
                form = form_of(prompt[1:])
            print(f"({form.name}; there are {' and '.join(f'/{name}' for name in FORMS)})")
            continue
        asked = tokenizer.chat(prompt, first=int(cache["pos"]) == 0)
        ids = words.encode(asked).ids
        padded = ids + [0] * (-len(ids) % PADDED_TO)
        if int(cache["pos"]) + len(padded) + given.answer > MAX_LEN:
            print("(the conversation is too long to go on)")
            return
        tokens = jnp.array([padded], jnp.int32)
        logits, cache = form.prefill(form.weights, tokens, cache, length=len(ids))
        cache = _answer(form, words, choose, logits, cache, given.answer)


def _answer(
    form: Form, words: Tokenizer, choose: Callable[..., Array], logits: Array, cache: Any, n: int
) -> Any:
    """Print at most n tokens as they come, and how fast they came; the cache that has read them."""
    text, end, said = DecodeStream(skip_special_tokens=True), words.token_to_id(tokenizer.END), 0
    place = int(cache["pos"])
    token = choose(logits, place=place)
    chosen = int(token[0])  # waits until the prompt has been read
    begun = time.perf_counter()
    while said < n and chosen != end:
        print(text.step(words, chosen) or "", end="", flush=True)
        logits, cache = form.step(form.weights, token, cache)
        said += 1
        token = choose(logits, place=place + said)
        chosen = int(token[0])
    rate = said / (time.perf_counter() - begun)
    print(f"\n({form.name}: {said} tokens, {rate:.0f} tokens/s)")
    return cache


def _prompts() -> Iterator[str]:
    with contextlib.suppress(EOFError):
        while prompt := input("> ").strip():
            yield prompt


def _given(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.smollm2.chat")
    parser.description = "Talk to SmolLM2; /dense and /rewritten change over, an empty line ends."
    add = parser.add_argument
    add("--dense", action="store_true", help="begin with the model as it is")
    add("--temperature", type=float, default=0.0, help="0 for the likeliest token (%(default)s)")
    add("--top-p", type=float, default=1.0, help="draw from so much of the chances (%(default)s)")
    add("--seed", type=int, default=0, help="of what is drawn (%(default)s)")
    add("--answer", type=int, default=256, help="tokens of an answer at most (%(default)s)")
    given = parser.parse_args(argv)
    if given.temperature < 0 or not 0 < given.top_p <= 1:
        parser.error("--temperature must not be negative, and --top-p be in (0, 1]")
    return given


if __name__ == "__main__":
    main()
