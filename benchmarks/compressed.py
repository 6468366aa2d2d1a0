"""Models on compressed weights, with and without exact parts: what they say beside the dense model.

Windows of text are read whole, many tokens at once. For that the rewritten function is exported
for any number of tokens: each token then has its own top k exactly and nothing else, as it has when
it is decoded. (In a call of so many tokens that they may ask for all exact rows together, all are
read, and nothing is guessed.) Inputs are not rounded so; `Bench.decoded` measures one row token by
token, with and without. It is a part of `benchmarks.quality`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, export

import hire_rewrite as hire
from examples.gemma3 import model, tokenizer, weights
from examples.smollm2 import text
from hire_rewrite.ops.encodings import Encoding
from hire_rewrite.rules import Rule

DECODED = 256  # of each kind are read token by token
GEMMA_TOKENS, GEMMA_LENGTH = 512, 256  # of each kind, and of a window

Rules = tuple[Rule, ...]


def ffn(rows: Encoding, k: float = 0, exact: Encoding | None = None, **settings: Any) -> Rules:
    """All FFN blocks in an encoding, with a fraction k of each token's neurons exactly."""
    settings |= {"tail": "predicted", "encoding": rows, "exact": exact}
    return (hire.FFN(k, max_tokens=None, force=True, **settings),)


def attention(
    rows: Encoding, k: float = 0, exact: Encoding | None = None, **settings: Any
) -> Rules:
    """Attention's four products in an encoding, a fraction k of each token's inputs exactly."""
    settings |= {"encoding": rows, "exact": exact}
    return (hire.Linear(k, path="w[qkvo]$", force=True, **settings),)


def both(
    rows: Encoding,
    inputs: float = 0,
    neurons: float = 0,
    exact: Encoding | None = None,
    **settings: Any,
) -> Rules:
    """All matrices of all layers."""
    return attention(rows, inputs, exact, **settings) + ffn(rows, neurons, exact, **settings)


ROW8, ROWS8 = hire.Blocks(8, None), hire.Blocks(8)
ROWS4, LEAST4 = hire.Blocks(4), hire.Blocks(4, minimum=True)
ROWS: dict[str, dict[str, Rules]] = {
    "FFN": {
        "8 bits a row": ffn(ROW8),
        "8 bits a row, top 2 % exact": ffn(ROW8, 0.02),
        "8 bits a row, top 5 % exact": ffn(ROW8, 0.05),
        "8 bits a row, top 10 % exact": ffn(ROW8, 0.1),
        "8 bits a row, top 20 % exact": ffn(ROW8, 0.2),
        "8 bits": ffn(ROWS8),
        "8 bits, top 2 % exact": ffn(ROWS8, 0.02),
        "8 bits, top 5 % exact": ffn(ROWS8, 0.05),
        "8 bits, top 10 % exact": ffn(ROWS8, 0.1),
        "8 bits, top 20 % exact": ffn(ROWS8, 0.2),
        "4 bits": ffn(ROWS4),
        "4 bits, top 2 % exact": ffn(ROWS4, 0.02),
        "4 bits, top 5 % exact": ffn(ROWS4, 0.05),
        "4 bits, top 10 % exact": ffn(ROWS4, 0.1),
        "4 bits, top 20 % exact": ffn(ROWS4, 0.2),
        "4 bits, top 10 % at 8 bits": ffn(ROWS4, 0.1, ROWS8),
        "8 bits a row, top 2 % by ∣h∣ exact": ffn(ROW8, 0.02, criterion="hidden"),
        "4 bits, top 10 % by ∣h∣ exact": ffn(ROWS4, 0.1, criterion="hidden"),
    },
    "Attention": {
        "8 bits a row": attention(ROW8),
        "8 bits a row, 2 % of inputs exact": attention(ROW8, 0.02),
        "8 bits a row, 5 % of inputs exact": attention(ROW8, 0.05),
        "8 bits a row, 10 % of inputs exact": attention(ROW8, 0.1),
        "4 bits": attention(ROWS4),
        "4 bits, 2 % of inputs exact": attention(ROWS4, 0.02),
        "4 bits, 5 % of inputs exact": attention(ROWS4, 0.05),
        "4 bits, 10 % of inputs exact": attention(ROWS4, 0.1),
    },
    "FFN and attention": {
        "8 bits": both(ROWS8),
        "8 bits a row, 2 % of inputs and neurons exact": both(ROW8, 0.02, 0.02),
        "4 bits": both(ROWS4),
        "4 bits, 5 % of inputs and 10 % of neurons exact": both(ROWS4, 0.05, 0.1),
        "4 bits, 5 % of inputs and 10 % of neurons at 8 bits": both(ROWS4, 0.05, 0.1, ROWS8),
        "4 bits with a minimum": both(LEAST4),
    },
}
"""What is measured, by what is compressed and how: to add a row is to add a line. Encodings are in
blocks of 32 unless they say otherwise; what is exact is float32, as the model has it, unless it
says otherwise."""
Q4_1 = (
    "Its file has these layers in 4 bits with a minimum already (Q4_1), and blocks with a minimum "
    "hold the same numbers; other rows of 4 bits round them once more."
)
DECODED_ROW = "4 bits, 5 % of inputs and 10 % of neurons exact"
GEMMA_ROWS = {
    "FFN": ("8 bits a row", "8 bits a row, top 2 % exact", "4 bits", "4 bits, top 10 % exact"),
    "Attention": ("4 bits", "4 bits, 5 % of inputs exact"),
    "FFN and attention": tuple(ROWS["FFN and attention"]),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Bench:
    """A model, and text of several kinds to measure on.

    Attributes:
      forward: (params, tokens: i32[1, n]) to logits: f32[1, n, vocab].
      params: float32 weights.
      windows: i32[m, n] of each kind.
    """

    forward: Callable[[Any, Array], Array]
    params: Any
    windows: Mapping[str, np.ndarray]

    def tables(self, rows: Mapping[str, Mapping[str, Rules]]) -> dict[str, Any]:
        """What `row` says of each, and the dense model's perplexity by kind."""
        windows = next(iter(self.windows.values()))
        found: dict[str, Any] = {"tokens": windows.size, "length": windows.shape[1]}
        found["perplexity"] = {
            kind: compare(said, said, self.windows[kind])["perplexity"]
            for kind, said in self._expected.items()
        }
        found["rows"] = {}
        for part, named in rows.items():
            found["rows"][part] = {}
            for name, rules in named.items():
                found["rows"][part][name] = row = self.row(rules)
                print(part, "|", name, "|", row, flush=True)
        return found

    def row(self, rules: Rules) -> dict[str, Any]:
        """Bytes that the compressed layers read for a token, beside their float32 ones, and of each
        kind of text the perplexity and the divergence from the dense model."""
        logits, plan = self._rewritten(rules)
        before, after = (
            sum(getattr(site, size) for site in plan.sites if site.status == "rewritten")
            for size in ("bytes_before", "bytes_after")
        )
        found: dict[str, Any] = {"rules": [str(rule) for rule in rules], "bytes": [before, after]}
        for kind, rows in self.windows.items():
            expected = self._expected[kind]
            found[kind] = compare([logits(row) for row in rows], expected, rows)
        return found

    def decoded(
        self, decode_step: Callable[..., Any], init_cache: Callable[[int, int], Any]
    ) -> dict[str, Any]:
        """The same of DECODED_ROW and the first tokens of each kind, read at once and one by one.

        Args:
          decode_step: (params, token, cache) to logits and cache (see `examples.smollm2.model`).
          init_cache: from the numbers of sequences and of tokens.
        """
        tokens = np.stack([rows[0, :DECODED] for rows in self.windows.values()])
        expected = [self._expected[kind][0][: tokens.shape[1]] for kind in self.windows]
        rules = ROWS["FFN and attention"][DECODED_ROW]
        rounded = tuple(rule.replace(round_inputs=True) for rule in rules)
        at_once, _ = self._rewritten(rules)

        def one_by_one(rules: Rules) -> Array:
            cache = init_cache(*tokens.shape)
            step, logits = hire.transform(decode_step, *rules), []
            packed = step.pack(self.params, jnp.asarray(tokens[:, 0]), cache)
            run = jax.jit(step, donate_argnums=2)
            for token in tokens.T:
                values, cache = run(packed, jnp.asarray(token), cache)
                logits.append(values)
            return jnp.stack(logits, axis=1)

        def by_kind(got: Sequence[Array] | Array) -> dict[str, dict[str, float]]:
            return {
                kind: compare([got[i]], [expected[i]], tokens[i : i + 1])
                for i, kind in enumerate(self.windows)
            }

        rows = {
            "at once": by_kind([at_once(row) for row in tokens]),
            "token by token": by_kind(one_by_one(rules)),
            "token by token, inputs rounded": by_kind(one_by_one(rounded)),
        }
        for name, row in rows.items():
            print(name, "|", row, flush=True)
        dense = {kind: values["perplexity"] for kind, values in by_kind(expected).items()}
        return {"row": DECODED_ROW, "tokens": tokens.shape[1], "perplexity": dense, "rows": rows}

    def _rewritten(self, rules: Rules) -> tuple[Callable[[np.ndarray], Array], hire.Plan]:
        """Tokens i32[n] to logits f32[n, vocab] by the rewritten model, and its plan for one token.

        Raises:
          RuntimeError: a rule was not used, or left a layer dense.
        """
        step = hire.transform(self.forward, *rules)
        single = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        packed = step.pack(self.params, single)
        plan = step.plan(packed, single)
        asked = [site for site in plan.sites if site.rule is not None]
        if plan.unused_rules or any(site.status != "rewritten" for site in asked):
            raise RuntimeError(f"not all is rewritten as it was asked for:\n{plan}")
        several = jax.ShapeDtypeStruct((1, *export.symbolic_shape("n")), jnp.int32)
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), packed)
        run = jax.jit(export.export(jax.jit(step))(shapes, several).call)
        return lambda tokens: run(packed, jnp.asarray(tokens)[None])[0], plan

    @functools.cached_property
    def _expected(self) -> dict[str, list[Array]]:
        """Of each window the dense model's log probabilities, f32[n, vocab]."""

        def read(params: Any, tokens: Array) -> Array:
            return jax.nn.log_softmax(self.forward(params, tokens[None])[0])

        run = functools.partial(jax.jit(read), self.params)
        return {
            kind: [run(jnp.asarray(row)) for row in rows] for kind, rows in self.windows.items()
        }


def compare(
    got: Sequence[Array], expected: Sequence[Array], tokens: np.ndarray
) -> dict[str, float]:
    """Perplexity by logits `got`, and their divergence from log probabilities `expected`, both
    f32[n, vocab] after each of tokens: i32[m, n] (see `_means`)."""
    each = [
        _means(*pair, jnp.asarray(row)) for *pair, row in zip(got, expected, tokens, strict=True)
    ]
    kl, nll = np.mean(np.asarray(each, np.float64), axis=0).tolist()
    return {"perplexity": round(math.exp(nll), 4), "kl": round(max(kl, 0.0), 6)}


@jax.jit
def _means(got: Array, expected: Array, tokens: Array) -> tuple[Array, Array]:
    """Means over tokens: i32[n] of KL(expected ‖ got) in nats, and of −log p of the next by got."""
    got = got - jax.nn.logsumexp(got, axis=-1, keepdims=True)
    kl = jnp.sum(jnp.exp(expected) * (expected - got), axis=-1)
    return kl.mean(), -jnp.take_along_axis(got[:-1], tokens[1:, None], axis=-1).mean()


def gemma3(kinds: Mapping[str, Callable[..., np.ndarray]]) -> dict[str, Any] | None:
    """The rows of GEMMA_ROWS on Gemma 3 270M, or None where its weights are not installed.

    Args:
      kinds: (number of tokens, tokenizer) to tokens, as in `examples.smollm2.text`.
    """
    try:
        params, config = weights.load()
    except FileNotFoundError as missing:
        print(f"left out: {missing}")
        return None
    words = tokenizer.load()
    first = words.token_to_id(tokenizer.BOS)
    windows = {
        kind: text.windows(read(GEMMA_TOKENS, words), GEMMA_LENGTH, first)
        for kind, read in kinds.items()
    }
    bench = Bench(functools.partial(model.forward, config), params, windows)
    rows = {part: {name: ROWS[part][name] for name in names} for part, names in GEMMA_ROWS.items()}
    return {"model": "Gemma 3 270M, float32"} | bench.tables(rows)
