"""Marian's translations with the neurons left out that its ReLUs make zero.

Encoder and decoder are rewritten, sentence by sentence. Tokens are compared with the dense model's,
greedy and with a beam.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import hire_rewrite as hire
from benchmarks import timing
from benchmarks.relu_blocks import DENSE, ffn_bytes
from benchmarks.relu_proofs import Block
from examples.translate import model, search
from examples.translate.tokenizer import END, UNKNOWN
from hire_rewrite.rules import Rule

BEAM = 4
TOLD, PROVED = "told by the first product", "proved from 8 bits"
EXACT = hire.Blocks(8, None, scale="float32")
"""What holds the numbers of these models, as packing finds without a rule."""
BATCH = 50  # sentences that are read at once for their layers' inputs


def rules() -> dict[str, tuple[Rule, ...]]:
    """The sides beside the dense one. Layers other than FFNs are as without rules."""
    positive = functools.partial(hire.FFN, k="positive", max_tokens=None, force=True)
    few = functools.partial(positive, predictor=hire.Quantized(4))
    blocks = {
        TOLD: positive(),
        PROVED: positive(predictor=hire.Quantized(8)),
        "4 bits, 3 deviations": few(margin=3.0),
        "4 bits, 2 deviations": few(margin=2.0),
    }
    both = {name: (rule, hire.Linear()) for name, rule in blocks.items()}
    return {"no rules": (), "the same numbers, all read": (hire.Linear(),), **both}


@dataclasses.dataclass(frozen=True, eq=False)
class Side:
    """One way to translate: an encoder and a step of the decoder, with what they are called with
    for weights."""

    encode: Callable[[Any, Any, Any], Array]
    step: search.Step
    weights: tuple[Any, Any]


class Translation:
    """A model, sentences, and the dense model's translations of them.

    Args:
      ids, mask: i32[n, source] and bool[n, source].
    """

    def __init__(
        self, params: Any, config: model.Config, ids: np.ndarray, mask: np.ndarray
    ) -> None:
        self.params, self.config = params, config
        self.ids, self.mask = ids, mask
        self._start = jax.jit(functools.partial(model.start, config))
        encode = functools.partial(model.encode, config)
        self.encode, self.step = encode, functools.partial(model.decode_step, config)
        self.dense = Side(jax.jit(encode), self.step, (params, params))
        self._forced = jax.jit(self._logits, static_argnums=0)
        self._watched = jax.jit(self._inputs)

    def side(self, chosen: Sequence[Rule]) -> tuple[Side, hire.Plan]:
        """The model by some rules, and the plan of its step."""
        encode = hire.transform(self.encode, *chosen, on_miss="ignore")
        step = hire.transform(self.step, *chosen, on_miss="ignore")
        ids, mask = self.ids[:1], self.mask[:1]
        state = self.begin(self.dense, 0)
        token = jnp.zeros(1, jnp.int32)
        read, state_some = self._calibration()
        encoder = encode.pack(self.params, ids, mask, calibration=[read])
        decoder = step.pack(self.params, token, state, calibration=state_some)
        side = Side(jax.jit(encode.__call__), step, (encoder, decoder))
        return side, step.plan(decoder, token, state)

    def _calibration(self) -> tuple[Any, list[Any]]:
        """Arguments after the weights: of the encoder, and of some steps of the decoder."""
        some = slice(0, 8)
        ids, mask = self.ids[some], self.mask[some]
        state = self._start(self.params, self.dense.encode(self.params, ids, mask), mask)
        steps, token = [], jnp.zeros(len(ids), jnp.int32)
        step = jax.jit(self.step)
        for _ in range(8):
            steps.append((token, state))
            logits, state = step(self.params, token, state)
            token = logits.argmax(-1).astype(jnp.int32)
        return (ids, mask), steps

    def begin(self, side: Side, i: int) -> model.State:
        """The state before the first token of sentence i."""
        ids, mask = jnp.asarray(self.ids[i : i + 1]), jnp.asarray(self.mask[i : i + 1])
        return self._start(self.params, side.encode(side.weights[0], ids, mask), mask)

    def greedy(self, side: Side, state: model.State) -> Array:
        return search.greedy(side.step, side.weights[1], state)[0]

    def beam(self, side: Side, state: model.State) -> Array:
        return search.beam_search(side.step, side.weights[1], state, BEAM)[0][0]

    def translations(self, side: Side) -> dict[str, np.ndarray]:
        """i32[n, steps] of each search."""
        found: dict[str, list[Array]] = {"greedy": [], f"beam of {BEAM}": []}
        for i in range(len(self.ids)):
            state = self.begin(side, i)
            for tokens, run in zip(found.values(), (self.greedy, self.beam), strict=True):
                tokens.append(run(side, state))
        return {name: np.stack(tokens) for name, tokens in found.items()}

    def _logits(self, step: search.Step, weights: Any, state: model.State, tokens: Array) -> Array:
        def turn(carry: Any, token: Array) -> Any:
            last, state = carry
            logits, state = step(weights, last, state)
            return (token[None], state), logits[0]

        return lax.scan(turn, (jnp.zeros(1, jnp.int32), state), tokens)[1]

    def forced(self, side: Side, i: int, tokens: np.ndarray) -> np.ndarray:
        """f32[n, vocab] of a side's step before each of tokens: i32[n], which it reads after the
        dense encoder has read sentence i."""
        state = self.begin(self.dense, i)
        return np.array(self._forced(side.step, side.weights[1], state, tokens))

    def beside(
        self, ours: Mapping[str, np.ndarray], dense: Mapping[str, np.ndarray]
    ) -> dict[str, Any]:
        """How many translations are the dense model's, and how near the others were decided.

        `gaps`: of a greedy one that differs, how far the dense model's two best logits are apart at
        the first token that does. `scores`: of one by a beam, how far the dense model's mean log
        probability of its own translation is above that of ours.
        """
        found: dict[str, Any] = {}
        for name, tokens in ours.items():
            (other,) = np.nonzero((tokens != dense[name]).any(1))
            found[name] = {"same": len(tokens) - len(other), "of": len(tokens)}
            if name == "greedy":
                gaps = [self._gap(int(i), tokens[i], dense[name][i]) for i in other]
                found[name]["gaps"] = sorted(round(gap, 6) for gap in gaps)
            else:
                scores = [
                    self._score(int(i), dense[name][i]) - self._score(int(i), tokens[i])
                    for i in other
                ]
                found[name]["scores"] = sorted(round(score, 6) for score in scores)
        return found

    def _gap(self, i: int, ours: np.ndarray, dense: np.ndarray) -> float:
        logits = self.forced(self.dense, i, dense)
        logits[:, UNKNOWN] = -np.inf
        first = int(np.flatnonzero(ours != dense)[0])
        best = np.sort(logits[first])[-2:]
        return float(best[1] - best[0])

    def _score(self, i: int, tokens: np.ndarray) -> float:
        n = length(tokens)
        chances = jax.nn.log_softmax(self.forced(self.dense, i, tokens)[:n], axis=-1)
        return float(np.take_along_axis(np.asarray(chances), tokens[:n, None], 1).mean())

    def _inputs(self, params: Any, ids: Array, mask: Array, tokens: Array) -> Any:
        """What each FFN reads, [b, source or n, d] of encoder's and decoder's layers, where the
        decoder reads tokens: i32[b, n]."""
        found: list[Array] = []
        ffn = model._ffn

        def watched(w: Any, x: Array) -> Array:
            found.append(x)
            return ffn(w, x)

        def turn(carry: Any, token: Array) -> Any:
            last, state = carry
            found.clear()
            _, state = self.step(params, last, state)
            return (token, state), tuple(found)

        with mock.patch.object(model, "_ffn", watched):
            encoded = self.encode(params, ids, mask)
            encoder = tuple(found)
            state = model.start(self.config, params, encoded, mask)
            begin = (jnp.zeros_like(ids[:, 0]), state)
            _, decoder = lax.scan(turn, begin, tokens.T)
        return encoder, tuple(jnp.swapaxes(x, 0, 1) for x in decoder)

    def inputs(self, tokens: np.ndarray) -> dict[str, list[np.ndarray]]:
        """f32[n, d] of each layer of `encoder` and `decoder`, token after token, where the decoder
        reads tokens: i32[sentences, n]."""
        parts: dict[str, list[list[np.ndarray]]] = {"encoder": [], "decoder": []}
        steps = max(map(length, tokens))
        for start in range(0, len(tokens), BATCH):
            some = slice(start, start + BATCH)
            mask, said = self.mask[some], tokens[some, :steps]
            real = np.arange(steps) < np.array([[length(row)] for row in said])
            both = self._watched(self.params, self.ids[some], mask, said)
            for part, arrays, kept in zip(parts.values(), both, (mask, real), strict=True):
                part.append([np.asarray(x)[kept] for x in arrays])
        return {
            name: [np.concatenate(layer) for layer in zip(*part, strict=True)]
            for name, part in parts.items()
        }

    def blocks(self) -> Iterator[tuple[str, int, Block]]:
        """The FFNs: "encoder" or "decoder", which layer, and its matrices."""
        for part in ("encoder", "decoder"):
            for i, layer in enumerate(self.params[part]):
                w = layer["ffn"]
                yield part, i, Block(w["w1"], w["b1"], w["w2"])

    def dense_bytes(self) -> list[int]:
        """Of weights that a dense step reads for a token: of all, and of the FFNs alone."""
        used = [(name, each[name][w]) for each in self.params["decoder"] for name, w in _USED]
        blocks = sum(w.nbytes for name, w in used if name == "ffn")
        return [sum(w.nbytes for _, w in used) + self.params["embed"].nbytes, blocks]

    def bytes(self, chosen: Sequence[Rule], plan: hire.Plan, read: Sequence[float]) -> list[int]:
        """`dense_bytes` by some rules.

        read: the share of neurons that each of the decoder's FFNs reads.
        """
        every, blocks = self.dense_bytes()
        saved = {True: 0, False: 0}
        for site in plan.sites:
            saved["/ffn/" in site.name] += site.bytes_before - site.bytes_after
        others, planned = every - blocks - saved[False], blocks - saved[True]
        d, f = self.config.d_model, self.config.d_ff
        for rule in chosen:
            if isinstance(rule, hire.FFN):
                told = rule.replace(exact=EXACT)
                planned = sum(ffn_bytes(told, d, f, "float32", share) for share in read)
        return [others + planned, planned]


_USED = [
    *(("rnn", name) for name in ("w", "wf")),
    *(("attn", name) for name in ("wq", "wo")),
    *(("ffn", name) for name in ("w1", "w2")),
]


def length(tokens: np.ndarray) -> int:
    """Tokens up to the first END, with it."""
    return int(np.argmax(tokens == END)) + 1 if (tokens == END).any() else len(tokens)


def logits(
    translation: Translation, side: Side, tokens: np.ndarray, sentences: int
) -> dict[str, Any]:
    """How far the logits of a rewritten step are from the dense model's, which reads the same
    tokens, beside those of the dense model with its neurons in another order."""
    rng = np.random.default_rng(0)

    def shuffled(w: Any) -> Any:
        order = rng.permutation(w["b1"].shape[0])
        moved = {"w1": w["w1"][:, order], "b1": w["b1"][order], "w2": w["w2"][order]}
        return {**w, **moved}

    decoder = [{**each, "ffn": shuffled(each["ffn"])} for each in translation.params["decoder"]]
    weights = {**translation.params, "decoder": decoder}
    other = dataclasses.replace(translation.dense, weights=(weights, weights))
    count, off, orders, greatest = 0, 0.0, 0.0, 0.0
    for i in range(sentences):
        n = length(tokens[i])
        want, got, moved = (
            translation.forced(each, i, tokens[i])[:n] for each in (translation.dense, side, other)
        )
        count += n
        off = max(off, float(np.abs(got - want).max()))
        orders = max(orders, float(np.abs(moved - want).max()))
        greatest = max(greatest, float(np.abs(want).max()))
    return {"tokens": count, "off": off, "orders": orders, "greatest": greatest}


def times(
    translation: Translation, sides: Mapping[str, Side], rounds: int, sentences: int
) -> dict[str, Any]:
    """Milliseconds of a token of the decoder, greedy and with a beam, and of the encoder for a
    sentence: the same sentences by each side, in turn."""
    count = len(translation.ids)
    places = range(0, count, max(1, count // sentences))
    states = {name: [translation.begin(side, i) for i in places] for name, side in sides.items()}
    found: dict[str, Any] = {}

    def add(what: str, calls: Mapping[str, Callable[[], Any]], counts: Mapping[str, int]) -> None:
        taken = timing.alternate(calls, rounds).seconds
        each = {name: tuple(s / counts[name] for s in taken[name]) for name in calls}
        timings = timing.Timings(each)
        found[what] = {
            name: {**row, "ratio": round(timings.ratio(DENSE, name), 3)}
            for name, row in timings.summary().items()
        }

    for what, run in (("greedy", translation.greedy), (f"beam of {BEAM}", translation.beam)):

        def all_of(side: Side, begun: list[Any], run: Any = run) -> list[Array]:
            return [run(side, state) for state in begun]

        calls = {
            name: functools.partial(all_of, side, states[name]) for name, side in sides.items()
        }
        counts = {
            name: sum(length(np.asarray(tokens)) for tokens in call())
            for name, call in calls.items()
        }
        add(what, calls, counts)

    def read(side: Side) -> list[Any]:
        return [translation.begin(side, i) for i in places]

    calls = {name: functools.partial(read, side) for name, side in sides.items()}
    add("encoder, a sentence", calls, dict.fromkeys(calls, len(places)))
    return found
