"""SmolLM2-135M with its weights read in other ways: the same tokens? how fast? at what recall?

`python -m benchmarks.smollm2` measures, and writes `results/smollm2.json` and `smollm2_step.json`:

* prompts: on twenty prompts of many kinds, how often a rewritten decode step chooses the dense
  one's token given the same tokens before; and the head alone on the hidden states of those
  prompts, by several predictors.
* step: the time of a decode step and what it says on texts, dense, by all rules of SIDES, and of
  llama.cpp on the same file; and the time of reading prompts at once, where more than the head is
  narrow.

`--parts step` measures one of them again. With fewer prompts, tokens or rounds, or shorter texts,
it is a quick look, and nothing is written.
"""

import argparse
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
from benchmarks import quality, smollm2_head, timing, whole_step
from benchmarks.whole_step import everything
from examples.smollm2 import calibration, compare, demo, model, text, tokenizer, weights
from examples.smollm2.compare import Comparison
from hire_rewrite.plan import table
from hire_rewrite.rules import Rule

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
FIRST = 1  # the token that opens a chat
STREAMS, STREAM = 64, 32  # of the text that predictors are fitted to: how many, and how long
GOALS = {"agreement": 0.99, "head": smollm2_head.GOAL}
CERTIFIED = hire.Head(k=64, candidates=256, predictor=hire.Quantized(8), certify=True)


SIDES: dict[str, tuple[Rule, ...]] = {
    "head by LowRank(192)": (smollm2_head.RULES[0],),
    "head by LowRank(256)": (smollm2_head.RULES[1],),
    "head certified": (CERTIFIED,),
    "no rules": (),
    "no rules, inputs rounded": (
        hire.Linear(path="embed", encoding=hire.Blocks(8), round_inputs=True, force=True),
        hire.Linear(encoding=hire.Blocks(4, minimum=True), round_inputs=True, force=True),
    ),
    "8 bits, exact parts": everything(hire.Blocks(8), neurons=0.02, inputs=0.02),
    "4 bits, exact parts": everything(hire.Blocks(4, minimum=True), neurons=0.05, inputs=0.02),
    "4 bits": everything(hire.Blocks(4, minimum=True), neurons=0, inputs=0),
}
"""What is rewritten, by name: to add a way is to add a line."""
PARTS = ("prompts", "step")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smollm2", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="which (all)")
    for name, most, what in (
        ("prompts", len(CHAT) + len(CONTINUE), "how many"),
        ("tokens", TOKENS, "of each answer"),
        ("rounds", whole_step.ROUNDS, "in which a step is timed"),
        ("length", whole_step.LENGTH, "of the texts that a step reads, in tokens"),
    ):
        parser.add_argument(f"--{name}", type=int, default=most, help=f"{what} (%(default)s)")
    asked = parser.parse_args()
    whole = parser.parse_args(["--parts", *asked.parts]) == asked

    bench = Bench()
    setting = {
        "model": "SmolLM2-135M-Instruct, float32",
        "rules": {name: [str(rule) for rule in rules] for name, rules in SIDES.items()},
        "max_len": whole_step.MAX_LEN,
        "calibration": f"{len(bench.text)} tokens of Python's help topics",
    }
    results: dict[str, dict[str, Any]] = {}
    if "prompts" in asked.parts:
        agreement, hidden = bench.agreements(asked.prompts, asked.tokens)
        head = bench.heads(hidden)
        results["smollm2"] = {**setting, "goals": GOALS, "agreement": agreement, "head": head}
    if "step" in asked.parts:
        results["smollm2_step"] = {**setting, **bench.step(asked.rounds, asked.length)}
    command = " ".join(["python -m benchmarks.smollm2", *sys.argv[1:]])
    for name, result in results.items() if whole else ():
        print(f"\nwritten to {timing.write(name, result, command)}")


class Bench:
    """The loaded model, dense and rewritten.

    Attributes:
      text: i32[n], what the predictors are fitted to.
      dense: the compiled step and the weights that it is called with; it donates the cache.
    """

    def __init__(self) -> None:
        self.params, self.config = weights.load()
        self.words = tokenizer.load()
        self.text = text.help_text(STREAMS * STREAM, self.words)
        prefill = functools.partial(model.prefill, self.config)
        self.prefill = jax.jit(prefill, donate_argnames="cache")
        self._decode_step = functools.partial(model.decode_step, self.config)
        self.dense = (jax.jit(self._decode_step, donate_argnums=2), self.params)

    @functools.cached_property
    def rewritten(self) -> dict[str, tuple[Any, Any, hire.Plan]]:
        """The same of each of SIDES, with its plan."""
        found = {}
        for name, rules in SIDES.items():
            fitted = calibration.streams(
                self.prefill, self.params, self.config, self.text, STREAMS, STREAM
            )
            found[name] = whole_step.rewrite(
                self._decode_step, rules, self.params, self.config, fitted
            )
        return found

    def agreements(self, prompts: int, tokens: int) -> tuple[dict[str, Any], Array]:
        """How often each rewritten step chooses the dense one's token, by kind of prompt.

        Returns also what the head reads at these steps, hidden: f32[steps, d_model].
        """
        summary, hidden = {}, jnp.zeros((0, self.config.d_model))
        for name, (run, packed, _) in self.rewritten.items():
            print(f"\n{name}, fitted to {len(self.text):,} tokens of Python's help topics")
            summary[name], hidden = self._agreement((run, packed), prompts, tokens)
        return summary, hidden

    def _agreement(
        self, rewritten: tuple[Any, Any], prompts: int, tokens: int
    ) -> tuple[dict[str, Any], Array]:
        end = self.words.token_to_id(tokenizer.END)
        asked = [(kind, tokenizer.chat(prompt)) for kind, prompt in CHAT]
        by_kind: dict[str, list[Comparison]] = defaultdict(list)
        hidden = []
        for kind, prompt in [*asked, *CONTINUE][:prompts]:
            ids = self.words.encode(prompt).ids
            read = compare.reader(
                self.prefill, self.params, self.config, ids, end, whole_step.MAX_LEN
            )
            done = compare.compare(read, self.dense, rewritten, tokens, end)
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

    def step(self, rounds: int, length: int) -> dict[str, Any]:
        """Time and quality of a decode step, dense and rewritten, and of llama.cpp; prompts."""
        whole = sum(leaf.nbytes for leaf in jax.tree.leaves(self.params))
        side = functools.partial(whole_step.jax_side, self.config, FIRST)
        sides = {"dense": side(*self.dense, whole)}
        for name, (run, packed, plan) in self.rewritten.items():
            size = demo.weight_bytes(self.params, plan)[1]
            sides[name] = side(run, packed, size)
        forward = jax.jit(functools.partial(model.forward, self.config))
        texts = {kind: rows[0, :length] for kind, rows in quality.texts(self.words)[1].items()}
        measured = whole_step.measure(
            sides,
            texts,
            lambda tokens: forward(self.params, tokens[None])[0],
            rounds,
            first=FIRST,
            path=weights.find(),
            size=int(sum(tensor.n_bytes for tensor in weights.read().tensors)),
        )
        narrow = {
            name: (SIDES[name], packed)
            for name, (_, packed, _) in self.rewritten.items()
            if len(packed.sites) > 1
        }
        prefill = functools.partial(model.prefill, self.config)
        read = whole_step.prompts(prefill, self.params, narrow, self.config, self.text, rounds)
        return {**measured, "prompts": read}

    def heads(self, hidden: Array) -> dict[str, Any]:
        """The head alone on hidden: f32[steps, d_model], fitted to the text."""
        fitted = self.hidden(text.windows(self.text, STREAM))
        return smollm2_head.measure(self.params["embed"], hidden, fitted)

    @functools.cached_property
    def hidden(self) -> Callable[[Any], Array]:
        """What the head reads at each position of rows: i32[n, length]; f32[n, length, d_model]."""

        def read(params: model.Params, rows: Array) -> Array:
            cache = model.init_cache(self.config, rows.shape[0], rows.shape[1])
            return model._read(self.config, params, rows, cache, 0)[0]

        return functools.partial(jax.jit(read), self.params)


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


if __name__ == "__main__":
    main()
