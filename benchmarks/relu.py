"""Blocks with a ReLU without the neurons that it makes zero: `FFN(k="positive")`.

`python -m benchmarks.relu` measures, and writes `results/relu.json` and `docs/relu.md`:

* translation: Marian's models, dense and rewritten: the same translations? bytes and time;
* proofs: what is left out beside products in float64, and results beside what the order of sums
  changes;
* blocks: large blocks whose neurons are as often positive as Marian's: time, bytes, error;
* crossing: where a proof stops to pay, over the length of rows and the share of positive neurons;
* tighter: what tighter bounds would leave out.

Each part is written as soon as it is measured; `--parts blocks crossing` measures some of them
again. With fewer sentences or rounds it is a quick look, and nothing is written.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from scipy.special import ndtri

import hire_rewrite as hire
from benchmarks import relu_blocks, relu_page, relu_proofs, timing
from benchmarks import relu_translation as marian
from examples.translate import sentences, tokenizer, weights

SENTENCES, ROUNDS = 500, 15
SOURCE = 64  # tokens of a sentence, at most
PROVED, WATCHED = 10_000, 4096  # tokens of each layer
TIMED = 8  # sentences
SIZES = {(2048, 8192): 4, (4096, 16_384): 2}
"""d and f of blocks, and how many of them follow each other."""
MEANS = (0.1, 0.2)
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
CROSSING = (0.05, 0.1, 0.2, 0.3, 0.5)
PARTS = ("translation", "proofs", "blocks", "crossing", "tighter")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.relu", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="which (all)")
    parser.add_argument("--sentences", type=int, default=SENTENCES, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of timing (%(default)s)")
    parser.add_argument("--sizes", nargs="*", help='of blocks, such as "2048x8192"; all')
    asked = parser.parse_args(arguments)
    bench = Relu(asked.sentences, asked.rounds, asked.sizes)
    whole = asked.sentences >= SENTENCES and asked.rounds >= ROUNDS and not asked.sizes
    result: dict[str, Any] = {}
    if len(asked.parts) < len(PARTS) and (timing.RESULTS / "relu.json").exists():
        result = timing.read("relu")  # the others stay as they were measured
    result["sentences"] = SENTENCES
    for part in asked.parts:
        print(f"\n{part}", flush=True)
        result[part] = getattr(bench, part)()
        if whole:
            timing.write("relu", result, "python -m benchmarks.relu")
            print(f"\nwritten to {relu_page.write()}", flush=True)
    if not whole:
        print("\n".join(relu_page.lines({"command": "", "machine": timing.machine(), **result})))


class Relu:
    """The models, sentences for them, and what each part measures."""

    def __init__(self, count: int, rounds: int, sizes: Sequence[str] | None) -> None:
        self.count, self.rounds, self.sizes = count, rounds, sizes

    @functools.cached_property
    def english(self) -> marian.Translation:
        each = -(-self.count // len(sentences.KINDS))
        kinds = (sentences.sentences(kind, each) for kind in sentences.KINDS)
        return self._translation("en-pt", [s for some in zip(*kinds, strict=True) for s in some])

    @functools.cached_property
    def portuguese(self) -> marian.Translation:
        said = self._said("english")[f"beam of {marian.BEAM}"]
        return self._translation("pt-en", tokenizer.decode(tokenizer.load("en-pt"), said))

    def _translation(self, direction: str, texts: Sequence[str]) -> marian.Translation:
        params, config = weights.load(direction)
        words = tokenizer.load(direction)
        # Those that are too long are left out, so that one program serves all.
        short = [s for s in texts if len(words.encode(s).ids) < SOURCE and s.strip()]
        ids, mask = tokenizer.encode(words, short[: self.count], SOURCE)
        return marian.Translation(params, config, ids, mask)

    @functools.cache  # noqa: B019
    def _said(self, language: str) -> dict[str, np.ndarray]:
        """The dense model's translations."""
        model = getattr(self, language)
        return model.translations(model.dense)

    @functools.cache  # noqa: B019
    def _inputs(self, language: str) -> dict[str, list[np.ndarray]]:
        return getattr(self, language).inputs(self._said(language)["greedy"])

    @functools.cached_property
    def _bandwidth(self) -> float:
        return timing.bandwidth()

    def translation(self) -> dict[str, Any]:
        """Both directions."""
        return {name: self._of(name) for name in ("english", "portuguese")}

    def _of(self, language: str) -> dict[str, Any]:
        model, dense = getattr(self, language), self._said(language)
        found: dict[str, Any] = {
            "sentences": len(model.ids),
            "tokens": {name: sum(map(marian.length, said)) for name, said in dense.items()},
            "layers": marian.layers(model, self._inputs(language), WATCHED),
        }
        sides, rows = {relu_blocks.DENSE: model.dense}, {}
        for name, chosen in marian.rules().items():
            sides[name], plan = model.side(chosen)
            read = [
                row["rules"][name]["read"]
                for row in found["layers"]
                if row["part"] == "decoder" and name in row["rules"]
            ]
            rows[name] = model.beside(model.translations(sides[name]), dense)
            rows[name]["bytes"] = model.bytes(chosen, plan, read)
            print(name, rows[name], flush=True)
        found["bytes"] = model.dense_bytes()
        found["sides"] = rows
        said = dense["greedy"]
        found["logits"] = marian.logits(
            model, sides[marian.PROVED], said, min(len(said), 4 * TIMED)
        )
        found["times"] = marian.times(model, sides, said, self.rounds, TIMED)
        return found

    def proofs(self) -> list[dict[str, Any]]:
        """Both directions' layers, and random blocks."""
        few = min(PROVED, 20 * self.count)
        rows = []
        for language in ("english", "portuguese"):
            model = getattr(self, language)
            for row in marian.proofs(model, self._inputs(language), few):
                rows.append({**row, "what": f"Marian, from {language}: {row['what']}"})
        rng = np.random.default_rng(3)
        for d, f in ((512, 2048), (2048, 8192)):
            for dtype in ("float32", "bfloat16"):
                (w,) = relu_blocks.made(d, f, 1, dtype, self._often[0], 0.2)
                block = relu_proofs.Block(w["up"], w["bias"], w["down"])
                x = rng.standard_normal((few, d), np.float32)
                row = {"what": f"random, {d} / {f}, {dtype}"}
                row |= relu_proofs.check(block, x, hire.Quantized(8))
                print(row, flush=True)
                rows.append(row)
        return rows

    @functools.cached_property
    def _often(self) -> tuple[np.ndarray, dict[str, float]]:
        return marian.often(self.english, self._inputs("english"))

    def blocks(self) -> dict[str, Any]:
        real, means = self._often
        found = []
        for (d, f), layers in SIZES.items():
            if self.sizes and f"{d}x{f}" not in self.sizes:
                continue
            for dtype in ("float32", "bfloat16"):
                for mean in MEANS:
                    found.append(
                        relu_blocks.measure(
                            d, f, dtype, mean, real, layers=layers, tokens=(1, 4, 8),
                            rounds=self.rounds, bandwidth=self._bandwidth,
                        )
                    )  # fmt: skip
                    print(found[-1], flush=True)
                    jax.clear_caches()
        quantiles = np.quantile(real, (0.1, 0.25, 0.5, 0.75, 0.9))
        about = {"neurons": len(real), "mean": float(real.mean()), "quantiles": quantiles.tolist()}
        about |= means
        return {"real": about, "read_gb_s": round(self._bandwidth / 1e9, 2), "blocks": found}

    def crossing(self) -> list[dict[str, Any]]:
        chosen: Sequence[int] = LENGTHS
        if self.sizes:
            chosen = tuple(d for d in LENGTHS if any(s.startswith(f"{d}x") for s in self.sizes))
        return relu_blocks.crossing(chosen, CROSSING, (0.1, 0.2, 0.5), self.rounds, self._bandwidth)

    def tighter(self) -> list[dict[str, Any]]:
        """On random tokens, on those with a few great numbers, and on Marian's."""
        rng, d, f, n = np.random.default_rng(4), 1024, 4096, 64
        up = rng.standard_normal((d, f), np.float32) / np.sqrt(d)
        bias = np.full(f, float(ndtri(0.2)))
        great = rng.standard_t(3, (n, d)) / np.sqrt(3)
        data: dict[str, Any] = {
            "normal": (rng.standard_normal((n, d)), up, bias),
            "Student's t of 3 degrees": (great, up, bias),
        }
        inputs = self._inputs("english")
        for part, i, block in self.english.blocks():
            if i == len(inputs[part]) - 1:
                x = inputs[part][i]
                some = x[:: max(1, len(x) // 256)]
                data[f"Marian, {part} {i}"] = (some, *map(np.asarray, block[:2]))
        return relu_proofs.tighter(data)


if __name__ == "__main__":
    main()
