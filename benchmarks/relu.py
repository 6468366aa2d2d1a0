"""Blocks with a ReLU without the neurons that it makes zero: `FFN(k="positive")`.

`python -m benchmarks.relu` measures, and writes `results/relu.json` and `docs/relu.md`:

* translation: Marian's models, dense and rewritten: the same translations? bytes of a token;
* times: of a token and of a sentence of those;
* proofs: what is left out beside products in float64, and results beside what the order of sums
  changes;
* blocks: large blocks whose neurons are as often positive as Marian's: time, bytes, error;
* crossing: where a proof stops to pay, over the length of rows and the share of positive neurons;
* tighter: what tighter bounds would leave out.

What is measured is written at once; `--parts blocks crossing` measures some parts again, and
`--sizes 2048x8192 --dtypes bfloat16` some blocks. With fewer sentences or rounds it is a quick
look, and nothing is written.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from scipy.special import ndtri

import hire_rewrite as hire
from benchmarks import relu_blocks, relu_layers, relu_page, relu_proofs, timing
from benchmarks import relu_translation as marian
from examples.translate import sentences, tokenizer, weights

SENTENCES, ROUNDS = 500, 15
SOURCE, SPARE = 64, 20  # tokens of a sentence, at most; those of a kind that may be longer
PROVED, WATCHED = 10_000, 4096  # tokens of each layer
TIMED, LOGITS = 8, 32  # sentences
LANGUAGES = ("english", "portuguese")
SIZES = {(2048, 8192): 4, (4096, 16_384): 2}
"""d and f of blocks, and how many of them follow each other."""
DTYPES = ("float32", "bfloat16")
MEANS = (0.1, 0.2)
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
CROSSING = (0.05, 0.1, 0.2, 0.3, 0.5)
Case = tuple[tuple[int, int], str, float]
PARTS = ("translation", "times", "proofs", "blocks", "crossing", "tighter")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.relu", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="which (all)")
    parser.add_argument("--sentences", type=int, default=SENTENCES, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of timing (%(default)s)")
    parser.add_argument("--sizes", nargs="*", help='of blocks, such as "2048x8192"; all')
    parser.add_argument("--dtypes", nargs="*", choices=DTYPES, default=DTYPES, help="of blocks")
    asked = parser.parse_args(arguments)
    bench = Relu(asked.sentences, asked.rounds, asked.sizes, asked.dtypes)
    whole = asked.sentences >= SENTENCES and asked.rounds >= ROUNDS
    result: dict[str, Any] = {}
    for part in asked.parts:
        print(f"\n{part}", flush=True)
        for found in getattr(bench, part)(_recorded().get(part) if whole else None):
            result[part] = found
            if whole:  # what is not measured now stays as it was
                timing.write("relu", {**_recorded(), part: found}, "python -m benchmarks.relu")
                print(f"written to {relu_page.write()}", flush=True)
    if not whole:
        print("\n".join(relu_page.lines({"command": "", "machine": timing.machine(), **result})))


def _recorded() -> dict[str, Any]:
    return timing.read("relu") if (timing.RESULTS / "relu.json").exists() else {}


class Relu:
    """The models, sentences for them, and what each part measures.

    A part is given what was measured of it before, and yields what it has so far.
    """

    def __init__(
        self, count: int, rounds: int, sizes: Sequence[str] | None, dtypes: Sequence[str]
    ) -> None:
        self.count, self.rounds, self.sizes, self.dtypes = count, rounds, sizes, dtypes

    @functools.cached_property
    def english(self) -> marian.Translation:
        each = -(-self.count // len(sentences.KINDS)) + SPARE
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

    def translation(self, _: Any) -> Iterator[dict[str, Any]]:
        """Both directions."""
        found: dict[str, Any] = {}
        for language in LANGUAGES:
            found[language] = self._of(language)
            yield found

    def _of(self, language: str) -> dict[str, Any]:
        model, dense = getattr(self, language), self._said(language)
        found: dict[str, Any] = {
            "sentences": len(model.ids),
            "tokens": {name: sum(map(marian.length, said)) for name, said in dense.items()},
            "layers": relu_layers.layers(model, self._inputs(language), WATCHED),
            "bytes": model.dense_bytes(),
            "sides": {},
        }
        for name, chosen in marian.rules().items():
            side, plan = model.side(chosen)
            read = [
                row["rules"][name]["read"]
                for row in found["layers"]
                if row["part"] == "decoder" and name in row["rules"]
            ]
            row = model.beside(model.translations(side), dense)
            found["sides"][name] = {**row, "bytes": model.bytes(chosen, plan, read)}
            print(name, found["sides"][name], flush=True)
            if name == marian.PROVED:
                said = dense["greedy"]
                found["logits"] = marian.logits(model, side, said, min(len(said), LOGITS))
        return found

    def times(self, before: Any) -> Iterator[dict[str, Any]]:
        """Both directions, those sentences that `translation` has."""
        found: dict[str, Any] = dict(before or {})
        for language in LANGUAGES:
            model = getattr(self, language)
            sides = {relu_blocks.DENSE: model.dense}
            sides |= {name: model.side(chosen)[0] for name, chosen in marian.rules().items()}
            found[language] = marian.times(model, sides, self.rounds, TIMED)
            yield found

    def proofs(self, _: Any) -> Iterator[list[dict[str, Any]]]:
        """Both directions' layers, and random blocks."""
        few = min(PROVED, 20 * self.count)
        rows = []
        for language in LANGUAGES:
            model = getattr(self, language)
            for row in relu_layers.proofs(model, self._inputs(language), few):
                rows.append({**row, "what": f"Marian, from {language}: {row['what']}"})
        rng = np.random.default_rng(3)
        for d, f in ((512, 2048), (2048, 8192)):
            for dtype in DTYPES:
                (w,) = relu_blocks.made(d, f, 1, dtype, self._often[0], 0.2)
                block = relu_proofs.Block(w["up"], w["bias"], w["down"])
                x = rng.standard_normal((few, d), np.float32)
                row = {"what": f"random, {d} / {f}, {dtype}"}
                row |= relu_proofs.check(block, x, hire.Quantized(8))
                print(row, flush=True)
                rows.append(row)
        yield rows

    @functools.cached_property
    def _often(self) -> tuple[np.ndarray, dict[str, float]]:
        return relu_layers.often(self.english, self._inputs("english"))

    def blocks(self, before: Any) -> Iterator[dict[str, Any]]:
        """Each size, dtype, and share; those of before that are not asked for stay."""
        real, means = self._often
        quantiles = np.quantile(real, (0.1, 0.25, 0.5, 0.75, 0.9))
        about = {"neurons": len(real), "mean": float(real.mean()), "quantiles": quantiles.tolist()}
        about |= means
        kept = {} if before is None else {_case(block): block for block in before["blocks"]}
        for case in itertools.product(SIZES, DTYPES, MEANS):
            (d, f), dtype, mean = case
            if dtype not in self.dtypes or (self.sizes and f"{d}x{f}" not in self.sizes):
                continue
            kept[case] = relu_blocks.measure(
                d, f, dtype, mean, real, layers=SIZES[d, f], tokens=(1, 4, 8),
                rounds=self.rounds, bandwidth=self._bandwidth,
            )  # fmt: skip
            print(kept[case], flush=True)
            jax.clear_caches()
            bandwidth = round(self._bandwidth / 1e9, 2)
            in_order = [kept[each] for each in sorted(kept, key=_order)]
            yield {"real": about, "read_gb_s": bandwidth, "blocks": in_order}

    def crossing(self, before: Any) -> Iterator[list[dict[str, Any]]]:
        """Each length; those of before that are not asked for stay."""
        rows: dict[int, list[Any]] = {row["d"]: [] for row in before or ()}
        for row in before or ():
            rows[row["d"]].append(row)
        for d in LENGTHS:
            if self.sizes and not any(size.startswith(f"{d}x") for size in self.sizes):
                continue
            rows[d] = relu_blocks.crossing(
                (d,), CROSSING, (0.1, 0.2, 0.5), self.rounds, self._bandwidth
            )
            yield [row for each in sorted(rows) for row in rows[each]]

    def tighter(self, _: Any) -> Iterator[list[dict[str, Any]]]:
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
        yield relu_proofs.tighter(data)


def _case(block: Mapping[str, Any]) -> Case:
    return (block["d"], block["f"]), block["dtype"], block["mean"]


def _order(case: Case) -> tuple[Any, ...]:
    size, dtype, mean = case
    return size, DTYPES.index(dtype), mean


if __name__ == "__main__":
    main()
