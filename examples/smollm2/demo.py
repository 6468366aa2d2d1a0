"""The whole way on a real language model: `python -m examples.smollm2.demo`, or `make demo`.

SmolLM2-135M decodes a few prompts as it is, and rewritten without a rule: with the same numbers in
fewer bytes. Beside them llama.cpp reads the file that the weights come from, where it is installed.
Every figure printed is measured here or read from a value; none is written in this file.
"""

import dataclasses
import functools
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

import hire_rewrite as hire
from benchmarks import peers, timing
from hire_rewrite.plan import table

from . import compare, generate, model, tokenizer, weights
from .compare import Answer, Comparison

PROMPTS = (
    "Why is the sky blue?",
    "Write a Python function that reverses a string.",
    "Tell me a short story about a dog and a lighthouse.",
    "What do I need to bake an apple pie?",
)
ANSWER = 40  # tokens at most
ROUNDS, BLOCK = 15, 16  # turns of each side, and the tokens that it decodes in each
FIRST = 1  # the token that opens a chat
MAX_LEN = 512
PEER = "llama.cpp"
GET_PEER = "pip install --no-deps --only-binary :all: 'cyllama>=0.2.18'"
DIFF = Path("out/smollm2.html")
WIDTH = 110


@dataclasses.dataclass(frozen=True, eq=False)
class Side:
    """One way to decode.

    Attributes:
      block: decodes BLOCK tokens from an empty cache.
      bytes: of weights that are read for a token.
      compared: with the dense step, an answer each.
    """

    block: Callable[[], Any]
    bytes: int
    compared: list[Comparison] = dataclasses.field(default_factory=list)


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
    before, after = weight_bytes(params, plan)
    read = f"Weights read for one token: {_mb(before)} dense, {_mb(after)} rewritten."
    _say(str(plan), "", read)

    dense = (jax.jit(decode_step, donate_argnums=2), params)
    rewritten = (jax.jit(step, donate_argnums=2), packed)
    sides = {
        "dense": Side(_block(dense, config), before),
        "rewritten": Side(_block(rewritten, config), after),
    }
    peer = peers.build("decoder", "llama_cpp", weights.find(), MAX_LEN)
    there = not isinstance(peer, str)
    if there:
        size = int(sum(tensor.n_bytes for tensor in weights.read().tensors))
        sides[PEER] = Side(functools.partial(peer.greedy, FIRST, BLOCK), size)

    _heading("The same prompts: what the model says")
    prefill = jax.jit(functools.partial(model.prefill, config), donate_argnames="cache")
    end = words.token_to_id(tokenizer.END)
    for prompt in PROMPTS:
        asked = words.encode(tokenizer.chat(prompt)).ids
        reader = compare.reader(prefill, params, config, asked, end, MAX_LEN)
        said = compare.answer(reader, dense, ANSWER, end)
        first, n = jnp.array([said.first]), len(said.tokens)
        alone, _, _ = generate.greedy(*rewritten, reader()[1], first, n)
        answers = {"rewritten": [said.first, *np.asarray(alone[0]).tolist()]}
        logits = {"rewritten": compare.follow(reader, rewritten, said)}
        if there:
            answers[PEER] = peer.answer(asked, 1 + n)
            logits[PEER] = jnp.asarray(peer.logits([*asked, *said.read])[-n:])
        compared = {name: compare.beside(said, given) for name, given in logits.items()}
        _show(prompt, said, answers, compared, words)
        for name, one in compared.items():
            sides[name].compared.append(one)

    _heading("The whole step")
    _measure(sides)
    if there:
        peer.close()
    else:
        _say("", f"{PEER} is missing: {peer}; to have it beside them: {GET_PEER}")

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


def _block(side: tuple[generate.Step, Any], config: model.Config) -> Callable[[], Any]:
    """Decodes BLOCK tokens from an empty cache, which the step may donate."""

    def decode() -> Any:
        cache = model.init_cache(config, 1, MAX_LEN)
        return generate.greedy(*side, cache, jnp.array([FIRST]), BLOCK)[0]

    return decode


def _measure(sides: Mapping[str, Side]) -> None:
    """Time the sides, and print all that was measured of each in a row."""
    rate = timing.bandwidth()
    blocks = {name: side.block for name, side in sides.items()}
    timings = timing.alternate(blocks, ROUNDS, cold=True)
    header = ["", "ms a token", "tokens/s", "times dense", "MB read", "floor ms", "KL",
              "same token", f"top {compare.TOP}"]  # fmt: skip
    rows = []
    for name, side in sides.items():
        seconds = timings.median(name) / BLOCK
        rows.append(
            [
                name,
                f"{1e3 * seconds:.1f}",
                f"{1 / seconds:.0f}",
                f"{timings.ratio('dense', name):.2f}",
                f"{side.bytes / 1e6:.1f}",
                f"{1e3 * side.bytes / rate:.1f}",
                *_quality(side.compared),
            ]
        )
    where = timing.machine()
    _say(
        table([header, *rows]),
        "",
        f"Time: one sequence, {BLOCK} tokens a turn, medians of {ROUNDS} alternating turns and of",
        f"their ratios; {where['processor']}, {where['cores']} cores, jax {where['jax']}. The "
        f"floor is the bytes over {rate / 1e9:.1f} GB/s, the",
        "fastest read. KL(dense ‖ side) of the next token's chances, in nats, the share of tokens "
        "whose likeliest",
        f"next one is the dense one's, and of the dense {compare.TOP} likeliest those among the "
        f"side's {compare.TOP}: means over",
        f"the {sum(len(one.dense) for one in sides['rewritten'].compared)} tokens of the dense "
        "answers, which all sides were given.",
    )


def _quality(compared: Sequence[Comparison]) -> list[str]:
    """Divergence, tokens that are the same, and recall of the likeliest; nothing of nothing."""
    if not compared:
        return [""] * 3
    kl, same, recall = (
        float(np.concatenate(values).mean())
        for values in (
            [one.kl for one in compared],
            [one.rewritten == one.dense for one in compared],
            [one.recall for one in compared],
        )
    )
    return [f"{kl:.1e}", f"{same:.1%}", f"{recall:.1%}"]


def _show(
    prompt: str,
    said: Answer,
    answers: Mapping[str, Sequence[int]],
    compared: Mapping[str, Comparison],
    words: Tokenizer,
) -> None:
    """The dense answer and what the others answer by themselves; all with their first token."""
    print(f"\n  > {prompt}")
    dense = [said.first, *said.tokens.tolist()]
    for side, tokens in {"dense": dense, **answers}.items():
        text = words.decode(tokens)
        lines = [part for line in text.splitlines() for part in textwrap.wrap(line, WIDTH - 13)]
        print(textwrap.indent("\n".join(lines), " " * 13).replace(" " * 11, f"  {side:<9}", 1))
    for side, tokens in answers.items():
        n, together = len(dense), int(np.cumprod(np.equal(tokens, dense)).sum())
        parted = f"the same for {together} of {n}" if together < n else f"the same {n}"
        same, steps = compared[side].same, len(said.tokens)
        _say(f"{'':11}{side}: {parted} tokens; given the dense ones, {same} of {steps} the same")


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
