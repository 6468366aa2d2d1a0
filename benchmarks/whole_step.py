"""The whole decode step of a language model at batch 1: how fast each side is, and what it says;
and how fast it reads prompts.

Time: a side decodes greedy tokens from an empty cache, a block of them a turn. Quality: the same
step reads texts of the kinds of `benchmarks.quality`, token by token, and its logits are compared
with those of the dense model in float32. llama.cpp reads the file that all the weights come from.
Prompts: a side reads all tokens of one in one call, with the weights that its step was packed to.
The model is one of `examples`, whose steps share the form of their cache.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import hire_rewrite as hire
from benchmarks import peers, timing
from examples.layers import Cache, CacheSizes, init_cache
from examples.smollm2 import generate
from hire_rewrite.ops.encodings import Encoding
from hire_rewrite.plan import table
from hire_rewrite.rules import Rule

TOKENS = 64  # of a block
LENGTH = 512  # of the text of each kind
MAX_LEN = 512
ROUNDS = 15
PEER = "llama.cpp"
PROMPTS = (128, 256, 512)  # tokens


@dataclasses.dataclass(frozen=True, eq=False)
class Side:
    """One way to decode.

    Attributes:
      greedy: chooses TOKENS tokens after the first.
      logits: f32[n, vocab] after each of tokens: i32[n], which are read one by one.
      bytes: of weights that are read for a token.
    """

    greedy: Callable[[], Any]
    logits: Callable[[np.ndarray], Any]
    bytes: int


def everything(rows: Encoding, neurons: float, inputs: float) -> tuple[Rule, ...]:
    """Rules for every layer: compressed, and so many neurons and inputs of each token exactly, from
    rows in 8 bits."""
    exact = hire.Blocks(8)
    linear = hire.Linear(
        inputs, encoding=rows, exact=exact if inputs else None, round_inputs=True, force=True
    )
    head = hire.Head(predictor=hire.Quantized(4))
    if not neurons:
        return linear, head
    block = hire.FFN(
        neurons, tail="predicted", encoding=rows, exact=exact, round_inputs=True, force=True
    )
    return block, linear, head


def rewrite(
    decode_step: generate.Step,
    rules: Iterable[Rule],
    params: Any,
    config: CacheSizes,
    calibration: Iterable[Any],
) -> tuple[Any, Any, hire.Plan]:
    """The compiled step by the rules, which donates its cache, its packed weights and its plan.

    Args:
      calibration: calls of the step without the weights, which the rules are fitted to.
    """
    call = (params, jnp.zeros(1, jnp.int32), init_cache(config, 1, MAX_LEN))
    step = hire.transform(decode_step, *rules)
    packed = step.pack(*call, calibration=calibration)
    plan = step.plan(packed, *call[1:])
    return jax.jit(step, donate_argnums=2), packed, plan


def jax_side(config: CacheSizes, first: int, step: generate.Step, held: Any, size: int) -> Side:
    """A compiled step, which donates its cache, with what it is called with for weights.

    Args:
      first: the token that text begins with.
      size: bytes of weights that are read for a token.
    """
    cache = functools.partial(init_cache, config, 1, MAX_LEN)

    def greedy() -> Array:
        return generate.greedy(step, held, cache(), jnp.array([first]), TOKENS)[0]

    def logits(tokens: np.ndarray) -> Array:
        state, found = cache(), []
        for token in jnp.asarray(tokens)[:, None]:
            values, state = step(held, token, state)
            found.append(values[0])
        return jnp.stack(found)

    return Side(greedy, logits, size)


def measure(
    sides: Mapping[str, Side],
    texts: Mapping[str, np.ndarray],
    forward: Callable[[np.ndarray], Array],
    rounds: int,
    *,
    first: int,
    path: Path,
    size: int,
) -> dict[str, Any]:
    """Time and quality of the sides and of llama.cpp.

    Args:
      sides: "dense" is one of them.
      texts: tokens i32[n] of each kind.
      forward: the dense model, tokens: i32[n] to logits: f32[n, vocab].
      first: the token that text begins with.
      path, size: of llama.cpp's file, and the bytes of weights in it.
    """
    made = peers.build("decoder", "llama_cpp", path, MAX_LEN)
    sides, missing = dict(sides), {}
    if isinstance(made, str):
        missing[PEER] = made
    else:
        sides[PEER] = Side(functools.partial(made.greedy, first, TOKENS), made.logits, size)
    rate = timing.bandwidth()
    blocks = {name: side.greedy for name, side in sides.items()}
    # Cold, for a pause: threads that wait busily after a block are asleep before the next one.
    taken = timing.alternate(blocks, rounds, cold=True).seconds
    tokens = timing.Timings({name: tuple(s / TOKENS for s in each) for name, each in taken.items()})
    sizes = {name: side.bytes for name, side in sides.items()}
    result: dict[str, dict[str, Any]] = {**tokens.beside("dense", sizes, rate)}
    if PEER in sides:
        own = statistics.median(made.own[-rounds:]) / TOKENS
        result[PEER] |= {"own_ms": round(1e3 * own, 4), "spins": made.spins}
    for name, side in sides.items():
        result[name] |= _quality(side, texts, forward)
    if PEER in sides:
        made.close()
    print(f"\nA decode step, batch 1, {rounds} rounds of {TOKENS} tokens, max_len {MAX_LEN}")
    print(_table(result))
    for name, reason in missing.items():
        print(f"{name}: {reason}")
    return {
        "max_len": MAX_LEN,
        "tokens": TOKENS,
        "length": max(map(len, texts.values())),
        "read_gb_s": round(rate / 1e9, 2),
        "libraries": peers.versions("cyllama"),
        "sides": result,
        "missing": missing,
    }


def prompts(
    prefill: Callable[[Any, Array, Cache], tuple[Array, Cache]],
    params: Any,
    sides: Mapping[str, tuple[Iterable[Rule], Any]],
    config: CacheSizes,
    text: np.ndarray,
    rounds: int,
) -> dict[str, dict[str, Any]]:
    """The time of reading a prompt at once, by its number of tokens and side.

    Args:
      prefill: the weights, tokens: i32[1, n] and an empty cache to logits and the cache.
      params: the weights of the dense side.
      sides: of each step the rules, and the weights packed by them.
      text: i32[n], whose first tokens are the prompts.
    """
    results = {}
    for length in PROMPTS:
        tokens = jnp.asarray(text[None, :length])
        readers = {"dense": _reader(prefill, params, config, tokens)}
        counts = {"dense": (0, 0)}
        for name, (rules, packed) in sides.items():
            step = hire.transform(prefill, *rules)
            readers[name] = _reader(step, packed, config, tokens)
            plan = step.plan(packed, tokens, init_cache(config, 1, MAX_LEN))
            rewritten = sum(site.status == "rewritten" for site in plan.sites)
            counts[name] = rewritten, len(packed.sites)
        timings = timing.alternate(readers, rounds, cold=True)
        results[str(length)] = {
            name: {
                **summary,
                "ratio": round(timings.ratio("dense", name), 3),
                "rewritten": counts[name][0],
                "packed": counts[name][1],
            }
            for name, summary in timings.summary().items()
        }
        print(f"\nReading a prompt of {length} tokens, {rounds} rounds")
        print(_prompt_table(length, results[str(length)]), flush=True)
    return results


def _reader(
    prefill: Callable[[Any, Array, Cache], tuple[Array, Cache]],
    weights: Any,
    config: CacheSizes,
    tokens: Array,
) -> Callable[[], Array]:
    """Reads a prompt at every call, into one cache from its beginning; returns the logits."""
    read = jax.jit(prefill, donate_argnums=2)
    cache = init_cache(config, 1, MAX_LEN)

    def again() -> Array:
        nonlocal cache
        logits, cache = read(weights, tokens, {**cache, "pos": jnp.int32(0)})
        return logits

    return again


def _prompt_table(length: int, result: Mapping[str, Mapping[str, Any]]) -> str:
    header = ["", "ms", "tokens/s", "spread", "times as fast", "rewritten"]
    rows = [
        [
            name,
            f"{row['median_ms']:.1f}",
            f"{1e3 * length / row['median_ms']:.0f}",
            f"{row['spread']:.0%}",
            f"{row['ratio']:.2f}",
            f"{row['rewritten']} of {row['packed']}",
        ]
        for name, row in result.items()
    ]
    return table([header, *rows])


@jax.jit
def differences(got: Array, expected: Array, tokens: Array) -> dict[str, Array]:
    """What logits differ by, after each of tokens: i32[n]; both are f32[n, vocab].

    Returns means: `kl`, KL(expected ‖ got) in nats; `same_token`, how often both have the same
    greatest; `nll`, −log p of the next token by `got`.
    """
    p, q = (jax.nn.log_softmax(logits, axis=-1) for logits in (expected, got))
    return {
        "kl": jnp.sum(jnp.exp(p) * (p - q), axis=-1).mean(),
        "same_token": jnp.mean(p.argmax(-1) == q.argmax(-1)),
        "nll": -jnp.take_along_axis(q[:-1], tokens[1:, None], axis=-1).mean(),
    }


def _quality(
    side: Side, texts: Mapping[str, np.ndarray], forward: Callable[[np.ndarray], Array]
) -> dict[str, dict[str, float]]:
    """Divergence, share of the same greedy tokens, and perplexity by kind of text and of all."""
    found: dict[str, dict[str, float]] = {"kl": {}, "same_token": {}, "nll": {}}
    for kind, tokens in texts.items():
        means = differences(side.logits(tokens), forward(tokens), jnp.asarray(tokens))
        for what, value in means.items():
            found[what][kind] = float(value)
    for by_kind in found.values():
        by_kind["all"] = statistics.fmean(by_kind.values())
    nll = found.pop("nll")
    found["perplexity"] = {kind: float(np.exp(value)) for kind, value in nll.items()}
    return {  # + 0.0, for there is a −0.0
        what: {kind: round(value, 5) + 0.0 for kind, value in by_kind.items()}
        for what, by_kind in found.items()
    }


def _table(result: Mapping[str, Mapping[str, Any]]) -> str:
    header = ["", "ms", "tokens/s", "spread", "MB read", "floor ms", "times as fast", "KL",
              "same token", "perplexity"]  # fmt: skip
    rows = [header]
    for name, row in result.items():
        rows.append(
            [
                name,
                f"{row['median_ms']:.2f}",
                f"{1e3 / row['median_ms']:.1f}",
                f"{row['spread']:.0%}",
                f"{row['bytes'] / 1e6:.1f}",
                f"{row['floor_ms']:.2f}",
                f"{row['ratio']:.2f}",
                f"{row['kl']['all']:.4f}",
                f"{row['same_token']['all']:.1%}",
                f"{row['perplexity']['all']:.3f}",
            ]
        )
    return table(rows)
