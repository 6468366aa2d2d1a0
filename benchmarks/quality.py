"""How well predictors recall on SmolLM2-135M: text of one kind to fit, other kinds to measure.

`python -m benchmarks.quality` measures, and writes `results/quality.json` and `docs/quality.md`:

* compressed: the layers in 8 and 4 bits, with and without exact parts: perplexity and divergence;
* heads: recall and perplexity of several predictors on four kinds of text, fitted to help texts;
* mixing: the same predictor fitted to several kinds, and to what the model itself says;
* certified: greedy decoding with proofs beside the dense model's, token by token;
* blocks: the FFNs at half their neurons, with a fitted predictor, beside the exact top-k;
* tuned: what `tune` chooses for 99 % recall, and what that recalls on text it did not see.

Each part is written as soon as it is measured; `--parts heads tuned` measures some of them again.
With fewer tokens it is a quick look, and nothing is written.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tokenizers import Tokenizer

import hire_rewrite as hire
from benchmarks import compressed, quality_page, timing
from examples.smollm2 import model, text, tokenizer, weights

FITTED, MEASURED, LENGTH = 8192, 2048, 512
TOP = 64
KINDS: dict[str, Callable[..., np.ndarray]] = {
    "help": text.help_text,
    "code": text.code_text,
    "license": text.license_text,
    "table": text.table_text,
}
LOWRANK = hire.LowRank(192)
CASCADE = hire.Cascade(hire.LowRank(128), hire.Quantized(), 12000)
HEADS = (
    hire.Head(k=TOP, candidates=256, predictor=hire.LowRank(128), force=True),
    hire.Head(k=TOP, candidates=256, predictor=LOWRANK, force=True),
    hire.Head(k=TOP, candidates=256, predictor=CASCADE, force=True),
    hire.Head(k=TOP, candidates=256, predictor=hire.Quantized(4), force=True),
    hire.Head(k=TOP, candidates=256, predictor=hire.Quantized(), certify=True, force=True),
)
BLOCKS = tuple(
    hire.FFN(k=0.5, candidates=0.6, group=group, predictor=hire.LowRank(512), force=True)
    for group in (1, 8)
)
STREAMS, STEPS = 32, 320
PARTS = ("compressed", "certified", "heads", "blocks", "tuned", "mixing")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="which (all)")
    parser.add_argument(
        "--tokens", type=int, default=MEASURED, help="of each kind to measure on (%(default)s)"
    )
    asked = parser.parse_args()
    bench = Quality(asked.tokens)
    result: dict[str, Any] = {
        "model": "SmolLM2-135M-Instruct, float32",
        "fitted_tokens": FITTED,
        "measured_tokens": MEASURED,
    }
    if len(asked.parts) < len(PARTS):  # the others stay as they were measured
        result |= timing.read("quality")
    for part in asked.parts:
        print(f"\n{part}", flush=True)
        result[part] = getattr(bench, part)()
        if asked.tokens < MEASURED:
            continue
        timing.write("quality", result, "python -m benchmarks.quality")
        print(f"\nwritten to {quality_page.write()}", flush=True)


def texts(words: Tokenizer, first: int | None = None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Text to fit to, of the first kind, and text of each kind to measure on: i32[n, LENGTH].

    first: a token that every row begins with, for models that expect one before all text.
    """

    def rows(kind: str, count: int) -> np.ndarray:
        return text.windows(KINDS[kind](count, words), LENGTH, first)

    main, *others = KINDS
    both, fitting = rows(main, FITTED + MEASURED), FITTED // LENGTH
    return both[:fitting], {main: both[fitting:]} | {kind: rows(kind, MEASURED) for kind in others}


class Quality:
    """The model, and text to fit to and to measure on (see `texts`)."""

    def __init__(self, tokens: int = MEASURED) -> None:
        self.params, self.config = weights.load()
        self.words = tokenizer.load()
        self.fitting, whole = texts(self.words)
        self.rows = {kind: rows[: -(-tokens // LENGTH)] for kind, rows in whole.items()}
        self.embed = {"embed": self.params["embed"]}
        self._read: dict[bytes, Array] = {}

    def compressed(self) -> list[dict[str, Any]]:
        """Layers in 8 and 4 bits, with and without exact parts; of Gemma 3 too, if it is there."""
        forward = functools.partial(model.forward, self.config)
        bench = compressed.Bench(forward, self.params, self.rows)
        found: dict[str, Any] = {
            "model": "SmolLM2-135M-Instruct, float32",
            "note": compressed.Q4_1,
            **bench.tables(compressed.ROWS),
            "decoded": bench.decoded(
                functools.partial(model.decode_step, self.config),
                functools.partial(model.init_cache, self.config),
            ),
        }
        other = compressed.gemma3(KINDS)
        return [found] if other is None else [found, other]

    def heads(self) -> list[dict[str, Any]]:
        """Several predictors, fitted to help texts."""
        found = []
        for rule in HEADS:
            row = {"rule": str(rule.predictor), "candidates": rule.candidates}
            row |= self._head(rule, self.fitting)
            print(row, flush=True)
            found.append(row)
        return found

    def mixing(self) -> list[dict[str, Any]]:
        """What a small predictor gains from other text than help texts alone (see `heads`)."""
        said = self._said()
        share = len(self.fitting) // 2
        code = text.windows(text.code_text(MEASURED + FITTED, self.words), LENGTH)[-share:]
        mixes = {
            "help and code": np.concatenate([self.fitting[:share], code]),
            "help and what the model says": np.concatenate([self.fitting[:share], said[:share]]),
        }
        found = []
        for name, fitting in mixes.items():
            for rank in (128, 192):
                rule = hire.Head(k=TOP, candidates=256, predictor=hire.LowRank(rank), force=True)
                row = {"fitted_to": name, "rule": str(rule.predictor)} | self._head(rule, fitting)
                print(row, flush=True)
                found.append(row)
        return found

    def certified(self) -> dict[str, Any]:
        """Greedy tokens of a certified step and the dense one, each on its own way."""

        def decode_step(params: Any, token: Any, cache: Any) -> Any:
            return model.decode_step(self.config, params, token, cache)

        step = hire.transform(decode_step, HEADS[-1])
        call = (self.params, jnp.zeros(STREAMS, jnp.int32))
        cache = functools.partial(model.init_cache, self.config, STREAMS, LENGTH)
        packed = step.pack(*call, cache())
        dense = jax.jit(decode_step, donate_argnums=2)
        proved = jax.jit(step, donate_argnums=2)
        prefill = jax.jit(functools.partial(model.prefill, self.config))
        starts = np.concatenate([text.windows(r.ravel(), 256)[:, :32] for r in self.rows.values()])
        prompts, said = jnp.asarray(starts[:STREAMS]), []
        for run, read in ((dense, self.params), (proved, packed)):
            logits, state = prefill(self.params, prompts, cache())
            token, tokens = logits.argmax(-1).astype(jnp.int32), []
            for _ in range(STEPS):
                logits, state = run(read, token, state)
                token = logits.argmax(-1).astype(jnp.int32)
                tokens.append(token)
            said.append(np.stack(tokens))
        same, total = int((said[0] == said[1]).sum()), said[0].size
        print(f"{same} of {total} greedy tokens the same", flush=True)
        return {"tokens": total, "same": same, "streams": STREAMS}

    def blocks(self) -> list[dict[str, Any]]:
        """FFNs at half their neurons: perplexity dense, exact, and with a fitted predictor."""
        return [self._blocks(rule) for rule in BLOCKS]

    def _blocks(self, rule: hire.FFN) -> dict[str, Any]:
        step = hire.transform(functools.partial(model.forward, self.config), rule)
        fitting = [(jnp.asarray(row[None]),) for row in self.fitting[:8]]
        packed = step.pack(self.params, *fitting[0], calibration=fitting)
        found: dict[str, Any] = {"rule": str(rule.predictor), "group": rule.group}
        for kind, rows in self.rows.items():
            batches = [(jnp.asarray(row[None]),) for row in rows]
            report = step.evaluate(packed, batches, targets=_next)
            (site,) = report.sites
            assert report.model is not None
            assert report.model.perplexity is not None
            found[kind] = {
                "perplexity": _rounded(report.model.perplexity),
                "recall": _rounded([np.mean(site.recall), min(site.recall)]),
                "error": round(site.error_exact, 4),
            }
            print(rule.group, kind, found[kind], flush=True)
        return found | {"bytes": [site.bytes_dense, site.bytes_read]}

    def tuned(self) -> dict[str, Any]:
        """What `tune` chooses for head and blocks, measured on kinds that it did not see."""
        rules = (hire.FFN(k=0.5, force=True), hire.Head(k=TOP, force=True))
        step = hire.transform(functools.partial(model.forward, self.config), *rules)
        fitting = [(jnp.asarray(row[None]),) for row in self.fitting[:12]]
        tuned = step.tune(self.params, fitting, recall=0.99)
        print(tuned, flush=True)
        again = hire.transform(step.fn, *tuned)
        packed = again.pack(self.params, *fitting[0], calibration=fitting)
        default = {site.name: site.bytes_after for site in step.plan(self.params, _ONE).sites}
        found: dict[str, Any] = {
            "rules": [str(trial.rule) for trial in tuned.chosen],
            "bytes": {trial.name: [default[trial.name], trial.bytes] for trial in tuned.chosen},
        }
        for kind, rows in self.rows.items():
            batches = [(jnp.asarray(row[None]),) for row in rows]
            report = again.evaluate(packed, batches)
            found[kind] = {site.name: round(min(site.recall), 4) for site in report.sites}
            print(kind, found[kind], flush=True)
        return found

    def _head(self, rule: hire.Head, fitting: np.ndarray) -> dict[str, Any]:
        """A head alone on the hidden states of each kind."""
        step = hire.transform(_logits, rule)
        calibration = [(self.hidden(row),) for row in fitting]
        packed = step.pack(self.embed, calibration[0][0][:1], calibration=calibration)
        row: dict[str, Any] = {}
        for kind, rows in self.rows.items():
            batches = [(self.hidden(one),) for one in rows]
            wanted = iter([np.append(one[1:], -1) for one in rows])
            report = step.evaluate(packed, batches, targets=lambda _, w=wanted: next(w))
            (site,) = report.sites
            assert report.model is not None
            assert report.model.perplexity is not None
            at_512 = next(recall[0] for count, _, recall in site.curve if count == 512)
            row[kind] = {
                "arg_max": round(site.best, 4),
                "top_at_512": round(at_512, 4),
                "perplexity": _rounded(report.model.perplexity[::2]),
            }
            if site.proved is not None:
                row[kind]["proved"] = round(site.proved, 5)
        return row | {"bytes": site.bytes_read}

    @functools.cached_property
    def _hidden(self) -> Callable[[Any], Array]:
        def read(params: model.Params, row: Array) -> Array:
            cache = model.init_cache(self.config, 1, row.shape[0])
            return model._read(self.config, params, row[None], cache, 0)[0][0]

        return functools.partial(jax.jit(read), self.params)

    def hidden(self, row: np.ndarray) -> Array:
        """What the head reads at each position of row: i32[LENGTH]; f32[LENGTH, d_model]."""
        if row.tobytes() not in self._read:
            self._read[row.tobytes()] = self._hidden(jnp.asarray(row))
        return self._read[row.tobytes()]

    def _said(self) -> np.ndarray:
        """Text that the model makes up, from any first token, at temperature 1."""
        streams, length = FITTED // 2 // 64, 64
        step = jax.jit(functools.partial(model.decode_step, self.config), donate_argnums=2)
        cache = model.init_cache(self.config, streams, length + 1)
        key = jax.random.key(0)
        token = jax.random.randint(key, (streams,), 0, self.config.vocab)
        tokens = []
        for i in range(length):
            tokens.append(token)
            logits, cache = step(self.params, token, cache)
            token = jax.random.categorical(jax.random.fold_in(key, i), logits).astype(jnp.int32)
        return np.stack(tokens, 1).reshape(-1, LENGTH)


_ONE = jax.ShapeDtypeStruct((1, 1), jnp.int32)


def _logits(weights: dict[str, Array], hidden: Array) -> Array:
    return hidden @ weights["embed"].T


def _next(tokens: Array) -> np.ndarray:
    """The token behind each of tokens: i32[1, n]; −1 behind the last."""
    return np.append(np.asarray(tokens)[0, 1:], -1)


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(float(value), 4) for value in values]


if __name__ == "__main__":
    main()
