"""SmolLM2-135M with its vocabulary head rewritten: the same tokens? how fast? at what recall?

`python -m benchmarks.smollm2` measures three things and writes `results/smollm2.json`:

* agreement: on twenty prompts of many kinds, how often the rewritten decode step chooses the dense
  one's token given the same tokens before, for two predictors that were fitted to text of another
  kind, and for a head that proves its token.
* step: the time of a decode step, dense and rewritten by each of these rules.
* head: the head alone on the hidden states of those prompts, for several predictors.

With fewer prompts or tokens it is a quick look, and nothing is written.
"""

import argparse
import dataclasses
import functools
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import hire_rewrite as hire
from benchmarks import timing
from examples.smollm2 import calibration, compare, demo, model, text, tokenizer, weights
from examples.smollm2.compare import Comparison
from hire_rewrite.plan import table

CHAT = (
    ("question", "Why is the sky blue during the day but red at sunset?"),
    ("question", "How does a refrigerator keep food cold?"),
    ("question", "What were the main causes of the First World War?"),
    ("advice", "My neighbor plays loud music at night. How should I talk to him about it?"),
    ("advice", "I have a job interview tomorrow. Give me some advice."),
    ("story", "Tell me a short story about a lighthouse keeper who finds a message in a bottle."),
    ("story", "Write the opening paragraph of a detective novel set in Venice."),
    ("poem", "Write a poem about autumn leaves and the passing of time."),
    ("code", "Write a Python function that checks whether a string is a palindrome."),
    ("code", "Write an SQL query that finds the three best paid employees of every department."),
    ("list", "List ten animals that live in the Arctic, with one fact about each."),
    ("list", "Give me a shopping list for a vegetarian dinner for six people."),
    ("math", "A train travels 180 miles in 3 hours. How far does it go in 5 hours? Explain."),
    ("math", "Solve the equation 3x + 7 = 22 and show your work."),
    ("French", "Racontez-moi une courte histoire d'un chat qui voyage à Paris."),
    ("German", "Erkläre mir bitte, wie man einen Apfelkuchen backt."),
    ("Spanish", "¿Cuáles son los planetas del sistema solar? Describe cada uno."),
    ("letter", "Write an email to a customer whose order arrived two weeks late."),
)
CONTINUE = (
    ("story", "The old man had not spoken to anyone for three winters when the girl came down"),
    ("code", "#include <stdio.h>\n\nint main(void) {\n    int numbers[10];\n    for (int i = 0;"),
)
TOKENS = 64
GOALS = {"agreement": 0.99, "head": 2.5}
HEADS = (
    hire.Head(k=64, candidates=256, predictor=hire.LowRank(192), force=True),
    hire.Head(k=64, candidates=512, predictor=hire.LowRank(256), force=True),
    hire.Head(k=64, candidates=512, predictor=hire.LowRank(320), force=True),
    hire.Head(k=64, candidates=256, predictor=hire.Quantized(8), force=True),
)
CERTIFIED = hire.Head(k=64, candidates=256, predictor=hire.Quantized(8), certify=True)
STEPS = (HEADS[0], demo.HEAD, CERTIFIED)
MAX_LEN = 512
ROUNDS = 101


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smollm2", description=__doc__)
    prompts = len(CHAT) + len(CONTINUE)
    parser.add_argument("--prompts", type=int, default=prompts, help="how many (%(default)s)")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="for each (%(default)s)")
    asked = parser.parse_args()

    agreement, benches = {}, {}
    for rule in STEPS:
        bench = benches[_name(rule)] = Bench.load(rule)
        print(f"\n{rule}, fitted to {len(bench.text):,} tokens of Python's help topics")
        agreement[_name(rule)], hidden = bench.agreement(asked.prompts, asked.tokens)
    result = {
        "model": "SmolLM2-135M-Instruct, float32",
        "rules": [str(rule) for rule in STEPS],
        "max_len": MAX_LEN,
        "calibration": f"{len(bench.text)} tokens of Python's help topics",
        "agreement": agreement,
        "step": step(benches),
        "head": bench.heads(hidden),
        "goals": GOALS,
    }
    if (asked.prompts, asked.tokens) == (prompts, TOKENS):
        command = " ".join(["python -m benchmarks.smollm2", *sys.argv[1:]])
        print(f"\nwritten to {timing.write('smollm2', result, command)}")


@dataclasses.dataclass(frozen=True, eq=False)
class Bench:
    """The loaded model, dense and rewritten.

    Attributes:
      text: i32[n], what the predictors are fitted to.
      plan: of the decode step rewritten by the rule.
      dense, rewritten: compiled steps and the weights that they are called with; they donate the
        cache.
    """

    params: model.Params
    config: model.Config
    words: Any
    text: np.ndarray
    prefill: Callable[..., Any]
    plan: hire.Plan
    dense: tuple[Any, Any]
    rewritten: tuple[Any, Any]

    @classmethod
    def load(cls, rule: hire.Head) -> "Bench":
        params, config = weights.load()
        words = tokenizer.load()

        def decode_step(params: Any, token: Any, cache: Any) -> Any:
            return model.decode_step(config, params, token, cache)

        prefill = jax.jit(functools.partial(model.prefill, config), donate_argnames="cache")
        step = hire.transform(decode_step, rule)
        call = (params, jnp.zeros(1, jnp.int32), model.init_cache(config, 1, MAX_LEN))
        ids = text.help_text(demo.STREAMS * demo.LENGTH, words)
        batches = calibration.streams(prefill, params, config, ids, demo.STREAMS, demo.LENGTH)
        packed = step.pack(*call, calibration=batches)
        dense = (jax.jit(decode_step, donate_argnums=2), params)
        rewritten = (jax.jit(step, donate_argnums=2), packed)
        return cls(params, config, words, ids, prefill, step.plan(*call), dense, rewritten)

    def agreement(self, prompts: int, tokens: int) -> tuple[dict[str, Any], Array]:
        """How often the rewritten step chooses the dense one's token, by kind of prompt.

        Returns also what the head reads at these steps, hidden: f32[steps, d_model].
        """
        end = self.words.token_to_id(tokenizer.END)
        asked = [(kind, tokenizer.chat(prompt)) for kind, prompt in CHAT]
        by_kind: dict[str, list[Comparison]] = defaultdict(list)
        hidden = []
        for kind, prompt in [*asked, *CONTINUE][:prompts]:
            ids = self.words.encode(prompt).ids
            read = compare.reader(self.prefill, self.params, self.config, ids, end, MAX_LEN)
            done = compare.compare(read, self.dense, self.rewritten, tokens, end)
            by_kind[kind].append(done)
            told = np.array([*ids, done.first, *done.dense[:-1]])
            padded = np.pad(told, (0, -len(told) % compare.PADDED_TO))
            hidden.append(self.hidden(padded[None])[0, len(ids) : len(told)])
        summary = {kind: _agreement(done) for kind, done in by_kind.items()}
        summary["all"] = _agreement([done for some in by_kind.values() for done in some])
        print(f"\nThe rewritten step against the dense one (goal {GOALS['agreement']:.0%})")
        header = ["prompts", "steps", "same token", f"top {compare.TOP} found"]
        print(table([header, *(_agreement_row(kind, row) for kind, row in summary.items())]))
        return summary, jnp.concatenate(hidden)

    def heads(self, hidden: Array) -> dict[str, Any]:
        """The head alone, by several rules, at batch 1; recall on hidden: f32[steps, d_model]."""
        embed = {"embed": self.params["embed"]}
        fitted = self.hidden(text.windows(self.text, demo.LENGTH))
        x = hidden[:1]
        dense = jax.jit(_logits)
        expected = [
            dense(embed, part) for part in jnp.split(hidden, list(range(64, len(hidden), 64)))
        ]
        tokens: dict[str, Any] = {"dense": functools.partial(jax.jit(_token), embed, x)}
        logits: dict[str, Any] = {"dense": functools.partial(dense, embed, x)}
        size = {"dense": self.params["embed"].nbytes}
        quality = {}
        for rule in HEADS:
            name = _name(rule)
            head, argmax = hire.transform(_logits, rule), hire.transform(_token, rule)
            packed = head.pack(embed, x, calibration=[(row,) for row in fitted])
            tokens[name] = functools.partial(jax.jit(argmax), packed, x)
            logits[name] = functools.partial(jax.jit(head), packed, x)
            size[name] = sum(site.bytes_after for site in head.plan(embed, x).sites)
            quality[name] = _quality(head, packed, hidden, expected)
        result: dict[str, Any] = {"steps": len(hidden), "quality": quality}
        for what, sides in (("argmax", tokens), ("logits", logits)):
            rate = timing.bandwidth()
            timings = timing.alternate(sides, ROUNDS, cold=True)
            goal = f" (goal {GOALS['head']} times)" if what == "argmax" else ""
            print(f"\nThe head alone, batch 1, {what} returned, cold caches, {ROUNDS} rounds{goal}")
            print(_timing_table(timings, size, rate, quality))
            result[what] = _timing_result(timings, size, rate)
        return result

    @functools.cached_property
    def hidden(self) -> Callable[[Any], Array]:
        """What the head reads at each position of rows: i32[n, length]; f32[n, length, d_model]."""

        def read(params: model.Params, rows: Array) -> Array:
            cache = model.init_cache(self.config, rows.shape[0], rows.shape[1])
            return model._read(self.config, params, rows, cache, 0)[0]

        return functools.partial(jax.jit(read), self.params)


def step(benches: Mapping[str, Bench]) -> dict[str, Any]:
    """The time of one decode step at batch 1, dense and rewritten by each rule."""
    token, sides, size = jnp.zeros(1, jnp.int32), dict[str, Callable[[], Any]](), {}
    for name, bench in benches.items():
        for side, (run, held) in (("dense", bench.dense), (name, bench.rewritten)):
            cache = model.init_cache(bench.config, 1, MAX_LEN)
            sides.setdefault(side, demo.decoder(run, held, token, cache))
        size["dense"], size[name] = demo.weight_bytes(bench.params, bench.plan)
    rate = timing.bandwidth()
    timings = timing.alternate(sides, ROUNDS)
    print(f"\nA decode step, batch 1, max_len {MAX_LEN}, {ROUNDS} rounds")
    print(_timing_table(timings, size, rate))
    return _timing_result(timings, size, rate)


def _name(rule: hire.Head) -> str:
    certified = ", certified" if rule.certify else ""
    return f"{rule.predictor}, {rule.candidates} candidates{certified}"


def _logits(weights: dict[str, Array], hidden: Array) -> Array:
    return hidden @ weights["embed"].T


def _token(weights: dict[str, Array], hidden: Array) -> Array:
    return jnp.argmax(hidden @ weights["embed"].T, axis=-1)


def _quality(
    head: Any, packed: hire.Packed, hidden: Array, expected: list[Array]
) -> dict[str, float]:
    """Agreement and recall of a rewritten head at batch 1, one hidden state after another."""

    @jax.jit
    def compare_all(packed: Any, hidden: Array, expected: Array) -> tuple[Array, Array]:
        got = jax.lax.map(lambda x: head(packed, x[None])[0], hidden)
        same = jnp.argmax(got, axis=-1) == jnp.argmax(expected, axis=-1)
        return same, compare.recall(got, expected)

    parts = jnp.split(hidden, list(range(64, len(hidden), 64)))
    pairs = [compare_all(packed, *part) for part in zip(parts, expected, strict=True)]
    same, recall = (np.concatenate(values) for values in zip(*pairs, strict=True))
    return {
        "same_token": round(float(same.mean()), 4),
        "top_recall": round(float(recall.mean()), 4),
    }


def _agreement(done: list[Comparison]) -> dict[str, float]:
    steps = sum(len(one.dense) for one in done)
    same = sum(one.same for one in done)
    recall = sum(float(one.recall.sum()) for one in done)
    return {
        "prompts": len(done),
        "steps": steps,
        "same": same,
        "same_token": round(same / steps, 4),
        "top_recall": round(recall / steps, 4),
    }


def _agreement_row(kind: str, row: Mapping[str, float]) -> list[str]:
    same = f"{row['same']} = {row['same_token']:.1%}"
    return [f"{kind} × {row['prompts']}", str(row["steps"]), same, f"{row['top_recall']:.1%}"]


def _timing_table(
    timings: timing.Timings,
    size: Mapping[str, int],
    rate: float,
    quality: Mapping[str, Mapping[str, float]] | None = None,
) -> str:
    header = ["", "median ms", "spread", "MB read", "floor ms", "times as fast"]
    rows = [header + ["same token", f"top {compare.TOP} found"] * (quality is not None)]
    for side in timings.seconds:
        row = [
            side,
            f"{1e3 * timings.median(side):.2f}",
            f"{timings.spread(side):.0%}",
            f"{size[side] / 1e6:.1f}",
            f"{1e3 * size[side] / rate:.2f}",
            f"{timings.ratio('dense', side):.2f}",
        ]
        if quality is not None:
            row += [f"{value:.1%}" for value in quality.get(side, {}).values()] or ["", ""]
        rows.append(row)
    return table(rows)


def _timing_result(timings: timing.Timings, size: Mapping[str, int], rate: float) -> dict[str, Any]:
    result = {
        side: {
            **summary,
            "bytes": size[side],
            "floor_ms": round(1e3 * size[side] / rate, 4),
            "ratio": round(timings.ratio("dense", side), 3),
        }
        for side, summary in timings.summary().items()
    }
    return {"read_gb_s": round(rate / 1e9, 2), "sides": result}


if __name__ == "__main__":
    main()
