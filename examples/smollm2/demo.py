"""The whole way on a real language model: `python -m examples.smollm2.demo`, or `make demo`.

SmolLM2-135M decodes a few prompts as it is, and rewritten without a rule: with the same numbers in
fewer bytes. Every figure printed is measured here or read from a value; none is written in this
file.
"""

import functools
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

import hire_rewrite as hire
from benchmarks import timing

from . import compare, generate, model, tokenizer, weights
from .compare import Comparison

PROMPTS = (
    "Why is the sky blue?",
    "Write a Python function that reverses a string.",
    "Tell me a short story about a dog and a lighthouse.",
    "What do I need to bake an apple pie?",
)
ANSWER = 40  # tokens at most
ROUNDS = 41
MAX_LEN = 512
DIFF = Path("out/smollm2.html")
WIDTH = 110


def main() -> None:
    began = time.perf_counter()
    _heading("The model")
    params, config = weights.load()
    words = tokenizer.load()
    _say(_describe(params, config), f"loaded in {time.perf_counter() - began:.1f} s")

    def decode_step(params: Any, token: Any, cache: Any) -> Any:
        return model.decode_step(config, params, token, cache)

    _heading("Pack: look at the numbers, and store the same ones in fewer bytes where they fit")
    step = hire.transform(decode_step)
    call = (params, jnp.zeros(1, jnp.int32), model.init_cache(config, 1, MAX_LEN))
    start = time.perf_counter()
    packed = jax.block_until_ready(step.pack(*call))
    _say("step = hire.transform(decode_step)", f"packed = step.pack(...): {packed!r}")
    _say(f"{time.perf_counter() - start:.1f} s, once for these weights")

    _heading("The plan: what each layer became, and why")
    plan = step.plan(packed, *call[1:])
    before, after = map(_mb, weight_bytes(params, plan))
    _say(str(plan), "", f"Weights read for one token: {before} dense, {after} rewritten.")

    _heading("The same prompts, dense and rewritten: what the model says")
    prefill = jax.jit(functools.partial(model.prefill, config), donate_argnames="cache")
    dense = (jax.jit(decode_step, donate_argnums=2), params)
    rewritten = (jax.jit(step, donate_argnums=2), packed)
    end = words.token_to_id(tokenizer.END)
    compared = []
    for prompt in PROMPTS:
        asked = words.encode(tokenizer.chat(prompt)).ids
        read = compare.reader(prefill, params, config, asked, end, MAX_LEN)
        done = compare.compare(read, dense, rewritten, ANSWER, end)
        first = jnp.array([done.first])
        alone, _, _ = generate.greedy(*rewritten, read()[1], first, len(done.dense))
        _show(prompt, done, np.asarray(alone[0]), words)
        compared.append(done)
    _summarize(compared)

    _heading("The time for one token")
    _time(dense, rewritten, plan, config)

    _heading("The graph, before and after")
    changes = step.diff(packed, *call[1:])
    DIFF.parent.mkdir(exist_ok=True)
    changes.save(DIFF)
    changes.show()
    _say(f"(both sides beside each other, with links to the code: {DIFF})")
    print(f"\n{time.perf_counter() - began:.0f} s in all")


def weight_bytes(params: Any, plan: hire.Plan) -> tuple[int, int]:
    """Bytes of weights that one call reads, dense and rewritten.

    A tied embedding counts once: as the head. As an embedding one row of it is read.
    """
    dense = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    saved = sum(s.bytes_before - s.bytes_after for s in plan.sites if s.status == "rewritten")
    return dense, dense - saved


def decoder(step: generate.Step, weights: Any, token: Any, cache: Any) -> Callable[[], Any]:
    """Reads `token` once more at every call, into a cache that it keeps; returns the logits."""

    def decode() -> Any:
        nonlocal cache
        logits, cache = step(weights, token, cache)
        return logits

    return decode


def _time(
    dense: tuple[generate.Step, Any],
    rewritten: tuple[generate.Step, Any],
    plan: hire.Plan,
    config: model.Config,
) -> None:
    """Time the step; both sides are given with the weights to call them with."""
    rate, names = timing.bandwidth(), ("dense", "rewritten")
    token, sizes = jnp.zeros(1, jnp.int32), weight_bytes(dense[1], plan)
    steps = {
        name: decoder(*side, token, model.init_cache(config, 1, MAX_LEN))
        for name, side in zip(names, (dense, rewritten), strict=True)
    }
    timings = timing.alternate(steps, ROUNDS, cold=True)
    times = (
        f"{name} {1e3 * timings.median(name):.1f} ms, {1 / timings.median(name):.0f} tokens/s "
        f"(floor {1e3 * size / rate:.1f} ms)"
        for name, size in zip(names, sizes, strict=True)
    )
    _say(f"{'; '.join(times)}: {timings.ratio(*names):.2f} times as fast")
    where = timing.machine()
    _say(
        f"One sequence; {where['processor']}, {where['cores']} cores, jax {where['jax']}. Medians, "
        f"of the times and of the ratio in",
        f"each of {ROUNDS} alternating rounds with cold caches. The floor is the bytes over "
        f"{rate / 1e9:.1f} GB/s, the fastest read.",
    )


def _show(prompt: str, compared: Comparison, alone: np.ndarray, words: Tokenizer) -> None:
    """Both answers; alone: i32[n] is what the rewritten step said by itself."""
    print(f"\n  > {prompt}")
    for side, tokens in (("dense", compared.dense), ("rewritten", alone)):
        said = words.decode([compared.first, *tokens.tolist()])
        lines = [part for line in said.splitlines() for part in textwrap.wrap(line, WIDTH - 13)]
        print(textwrap.indent("\n".join(lines), " " * 13).replace(" " * 11, f"  {side:<9}", 1))
    n, together = len(alone), int(np.cumprod(alone == compared.dense).sum())
    parted = f"the same for {together} of {n} tokens" if together < n else f"the same {n} tokens"
    _say(" " * 11 + f"{parted}; given the same tokens before, {compared.same} of {n} the same")


def _summarize(compared: list[Comparison]) -> None:
    steps = sum(len(c.dense) for c in compared)
    same = sum(c.same for c in compared)
    recall = sum(float(c.recall.sum()) for c in compared) / steps
    _say(
        "",
        f"In {steps} steps the rewritten model chose the dense one's token {same} times "
        f"({100 * same / steps:.1f} %),",
        f"and of the {compare.TOP} tokens that the dense one ranks first it had "
        f"{100 * recall:.1f} % among its own {compare.TOP}.",
    )


def _describe(params: Any, config: model.Config) -> str:
    leaves = jax.tree.leaves(params)
    count, size = sum(leaf.size for leaf in leaves), sum(leaf.nbytes for leaf in leaves)
    return (
        f"SmolLM2-135M-Instruct: {count / 1e6:.1f} million numbers, {_mb(size)} as "
        f"{leaves[0].dtype}; {config.layers} layers, d_model {config.d_model}, d_ff {config.d_ff}, "
        f"vocabulary {config.vocab:,}"
    )


def _mb(size: float) -> str:
    return f"{size / 1e6:.1f} MB"


def _heading(title: str) -> None:
    print(f"\n{title}\n{'─' * len(title)}", flush=True)


def _say(*lines: str) -> None:
    print(textwrap.indent("\n".join(lines), "  "), flush=True)


if __name__ == "__main__":
    main()
