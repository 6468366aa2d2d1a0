"""`docs/relu.md` from `results/relu.json`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import relu_page_translation, timing
from benchmarks.markdown import table

PAGE = Path(__file__).parent.parent / "docs" / "relu.md"

Row = Mapping[str, Any]

METHOD = """\
# Blocks whose zeros are not read

Behind a ReLU a neuron that is not positive is exactly zero, and its row of the second matrix adds
nothing. `FFN(k="positive")` reads the rows of the others alone. It is for blocks whose activation
makes neurons zero: a ReLU, plain, squared, gated, clipped or with a threshold. There is no k: how
many neurons are read the data say, token by token.

```python
hire.FFN(k="positive")  # told by the first product, which is read whole
hire.FFN(k="positive", predictor=hire.Quantized(8))  # proved from the first matrix in 8 bits
hire.FFN(k="positive", predictor=hire.Quantized(4), margin=3.0)  # guessed from 4 bits
```

Code: [`ops/ffn/positive.py`](../hire_rewrite/ops/ffn/positive.py) (the operation),
[`ops/certify/interval.py`](../hire_rewrite/ops/certify/interval.py) (intervals),
[`ops/certify/quantized.py`](../hire_rewrite/ops/certify/quantized.py) and
[`dense.py`](../hire_rewrite/ops/certify/dense.py) (bounds of the guess and of the dense product),
[`sites/ffn/positive.py`](../hire_rewrite/sites/ffn/positive.py) (the site).

## What is exact, proved, and guessed

Let w be a neuron's row of the first matrix, ŵ what is stored of it in 8 or 4 bits, r = w − ŵ.

* **Told** (exact). The first product is computed whole. Neurons whose activation is zero are left
  out of the second. It reads the first matrix and a part of the second.
* **Proved.** The guess x·ŵ is off by at most ‖x‖ ‖r‖ (Cauchy and Schwarz) and by what arithmetic
  rounds (Higham; [the terms](certify.md#the-terms)). The dense model's own sum, in whatever order,
  is off by its bound. So its pre-activation lies in an interval. The model's own code between the
  two products is run on intervals (Moore): bias, scale, ReLU. Where what comes out is zero and
  nothing else, the neuron is left out. All others are computed from their own rows, of both
  matrices.
* **Guessed**, with `margin=c`. An error that has nothing to do with x points anywhere, and along x
  lies a part 1 / √d of it: c ‖x‖ ‖r‖ / √d stands in the place of the bound. This is not proved; few
  positive neurons are missed, and the tables say how many.

Told and proved lose nothing. What is proved is zero in the dense model too, whatever the order of
its sums; what is told is zero in the same product, summed in our order. The results are the dense
ones up to the order in which both products add. Where a token has more neurons than the budget,
the call reads all rows. A block whose weights hold a NaN or an infinity stays dense, for a zero
does not undo those. What the proof supposes is in
[the page on certified heads](certify.md#what-is-supposed-and-not-proved).

## On several devices

Each device leaves out the zeros among its own neurons: it has a list, a share of the budget, and
reads all of its rows where a token has more. So it is with weights that the compiler divides, along
their neurons or stored in shards along anything, and inside a `shard_map` of the function's own.
Rows are stored in few bits there too, each device's by themselves. Experts side by side in one
array stay on the devices that have them, and so do their tokens. Nothing of the size of a weight
goes between devices, and the gradient is the model's as on one. What a report calls `whole` is the
share of tokens for which some device reads all of its rows; inside a `shard_map`, the mean over
devices.

A block stays dense where its neurons do not divide among the devices, and where the compiler
divides a product that it shares with other layers. It is not found at all where devices add up or
send what is between its two products (no rule of `FFN` takes such a block).
"""

SOURCES = """
## Sources and related work

* N. Higham, *Accuracy and Stability of Numerical Algorithms*, 2nd ed., SIAM 2002: bounds
  of rounding.
* R. Moore, *Interval Analysis*, Prentice-Hall 1966.
* Z. Li et al., [The Lazy Neuron Phenomenon](https://arxiv.org/abs/2210.06313), ICLR 2023: behind a
  ReLU few neurons of trained transformers are not zero (3.0 % in T5-Base, by its abstract).
* I. Mirzadeh et al., [ReLU Strikes Back](https://arxiv.org/abs/2310.04564), 2023: ReLU in language
  models, and what its zeros save at inference.
* Z. Liu et al., [Deja Vu](https://arxiv.org/abs/2310.17157), 2023, and Y. Song et al.,
  [PowerInfer](https://arxiv.org/abs/2312.12456), 2023: predictors that say for each input which
  heads and neurons are needed. These are guesses. Nothing is trained here, and a guess has a bound.
* V. Akhlaghi et al., SnaPEA, ISCA 2018, and N. Kim et al., ComPreEND, IEEE Transactions on
  Computers 2022: accelerators that stop a sum before a ReLU as soon as it is certain to be negative
  (by the order of the signs, or of the bits), or likely to be. That is the same distinction of
  proved and guessed. They save operations; here it is bytes of weights, and rounding is bounded as
  well.
"""


def write() -> Path:
    """Write the page and return its path."""
    path = timing.RESULTS / "relu.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    PAGE.write_text("\n".join(lines(result)) + "\n", encoding="utf-8")
    return PAGE


def lines(result: Row) -> Iterable[str]:
    """The page; what was not measured is left out."""
    yield METHOD.rstrip()
    sections: dict[str, Callable[[Any], Iterable[str]]] = {
        "translation": lambda found: relu_page_translation.lines(found, result.get("times", {})),
        "proofs": _proofs,
        "blocks": _blocks,
        "crossing": _crossing,
        "tighter": _tighter,
    }
    for name, section in sections.items():
        if name in result:
            yield from section(result[name])
    yield SOURCES.rstrip()
    if "machine" not in result:
        return
    machine = result["machine"]
    yield (
        f"\nMeasured by `{result['command']}` (`make relu`) on {machine['processor']}, "
        f"{machine['cores']} cores, jax {machine['jax']}, Python {machine['python']}; sides take "
        "turns in random order, medians: [relu.json](../benchmarks/results/relu.json)."
    )


def _proofs(rows: Sequence[Row]) -> Iterable[str]:
    yield "\n## The proofs\n"
    skipped = sum(row["skipped"] for row in rows)
    wrong = sum(row["wrong"] for row in rows)
    yield (
        f"Of {skipped:,} neurons that `Quantized(8)` proves to be zero {wrong:,} are positive in "
        "float64. The results' greatest difference from the dense block, beside that of the dense "
        "block from itself with both of its sums in another order; and the greatest errors of "
        "both, from float64."
    )
    yield ""
    yield from table(
        ["block", "tokens", "positive", "read", "left out", "of them positive", "nearest",
         "difference", "other order", "**times**", "error", "of dense"],
        [
            [row["what"], f"{row['tokens']:,}", f"{row['positive']:.1%}", f"{row['read']:.1%}",
             f"{row['skipped']:,}", str(row["wrong"]), f"{row['greatest']:.1e}",
             f"{row['off']:.1e}", f"{row['orders']:.1e}",
             f"**{row['off'] / row['orders']:.2f}**" if row["orders"] else "",
             f"{row['error']:.1e}", f"{row['error_dense']:.1e}"]
            for row in rows
        ],
    )  # fmt: skip
    yield "\n“Nearest” is the greatest pre-activation that was left out."


def _blocks(result: Row) -> Iterable[str]:
    real = result["real"]
    quantiles = ", ".join(f"{q:.1%}" for q in real["quantiles"])
    yield "\n## Large blocks\n"
    yield (
        "Random weights. Biases are such that a neuron is as often positive as a neuron of Marian "
        f"({real['neurons']:,} of them: {real['mean']:.1%} on average; 10th, 25th, 50th, 75th and "
        f"90th percentile {quantiles}), all moved alike on the scale of a normal deviate to a mean "
        "of 10 or 20 %. So some neurons are nearly always positive, and the same ones again. "
        "Inputs of successive tokens are independent, which those of Marian are not: there "
        f"{real['positive']:.0%} of a layer's neurons are positive, and {real['again']:.0%} of "
        "them in the next token too. All that is of one layer of several one "
        "after another, each with arrays of its own, cold caches. Bytes count the rows of each "
        "token, with the share that was measured; the error is that of what the layers add, beside "
        f"the dense ones. {result['read_gb_s']} GB/s. The top k is another model, and 8 bits "
        "round: they are here for the time. Told and proved are exact."
    )
    for block in result["blocks"]:
        yield (
            f"\n### {block['d']} / {block['f']}, {block['dtype']}, {block['mean']:.0%} positive\n"
        )
        yield (
            f"{block['positive']:.1%} of the neurons of a token are positive, and "
            f"{block['again']:.0%} of those in the next one too."
        )
        for tokens in dict.fromkeys(row["tokens"] for row in block["rows"]):
            yield ""
            yield from table(
                [f"batch {tokens}", "ms", "spread", "**times dense**", "MB", "floor ms", "read",
                 "missed", "error"],
                [
                    [row["side"], f"{row['median ms']:.2f}", f"{row['spread']:.0%}",
                     f"**{row['ratio']:.2f} ×**", f"{row['bytes'] / 1e6:.1f}",
                     f"{row['floor ms']:.2f}",
                     f"{row['read']:.1%}" if "read" in row else "",
                     f"{row['missed']:.3%}" if "missed" in row else "",
                     f"{row['error']:.1e}" if "error" in row else ""]
                    for row in block["rows"] if row["tokens"] == tokens
                ],
            )  # fmt: skip


def _crossing(rows: Sequence[Row]) -> Iterable[str]:
    names = list(rows[0]["read"])
    told = names[0]
    yield "\n## Where a proof stops to pay\n"
    yield (
        "The bound grows with ‖x‖ ‖r‖, the pre-activation's standard deviation does not: the share "
        "that cannot be proved zero grows with √d. Random blocks, neurons alike, float32, one "
        "token: the share of neurons read, and bytes as a share of the dense block's. **Bold**: "
        "the fewest."
    )
    yield ""
    header = ["d", "positive"]
    cells = []
    for row in rows:
        least = min(row["bytes"].values())
        line = [str(row["d"]), f"{row['mean']:.0%}"]
        for name in names:
            size = f"{row['bytes'][name]:.0%}"
            size = f"**{size}**" if row["bytes"][name] == least else size
            line.append(f"{row['read'][name]:.1%}, {size}")
        cells.append(line)
    yield from table([*header, *names], cells)
    yield ""
    yield from _crossings(rows, names, told)
    timed = [row for row in rows if "times" in row]
    if not timed:
        return
    yield "\nTime of one block, batch 1, cold caches: milliseconds, and times as fast as dense.\n"
    yield from table(
        ["d / f", "positive", "dense", *names],
        [
            [f"{row['d']} / {row['f']}", f"{row['mean']:.0%}", f"{row['ms']['dense']:.2f}",
             *(f"{row['ms'][name]:.2f}, **{row['times'][name]:.2f} ×**" for name in names)]
            for row in timed
        ],
    )  # fmt: skip


def _crossings(rows: Sequence[Row], names: Sequence[str], told: str) -> Iterable[str]:
    """From which share of positive neurons on a proof reads more, for each length of rows."""
    for name in names[1:]:
        found = []
        for d in dict.fromkeys(row["d"] for row in rows):
            some = [row for row in rows if row["d"] == d]
            parts = [
                _crossed(some, name, lambda row: row["bytes"][told]),
                _crossed(some, name, lambda row: 1.0),
            ]
            found.append(f"{d}: {parts[0]} and {parts[1]}")
        yield (
            f"* {name[0].upper() + name[1:]} reads fewer bytes than what is {told}, and than "
            f"dense, below these shares of positive neurons, by d: {'; '.join(found)}."
        )


def _crossed(rows: Sequence[Row], name: str, other: Callable[[Row], float]) -> str:
    """The share at which the bytes of a side meet others, between those that were measured."""
    over = [row["bytes"][name] - other(row) for row in rows]
    if over[0] >= 0:
        return "none"
    for i in range(1, len(rows)):
        if over[i] >= 0:
            low, high = rows[i - 1]["mean"], rows[i]["mean"]
            return f"{low + (high - low) * -over[i - 1] / (over[i] - over[i - 1]):.0%}"
    return f"{rows[-1]['mean']:.0%} and above"


def _tighter(rows: Sequence[Row]) -> Iterable[str]:
    yield "\n## What tighter bounds would prove\n"
    yield (
        "An analysis in float64 (`python -m benchmarks.relu --parts tighter`); none of this but "
        "the first line and the last is done. By blocks of columns |x·r| ≤ Σ ‖x_b‖ ‖r_b‖, which "
        "is never above ‖x‖ ‖r‖, for one more norm a row and block. With the residuals of the "
        "columns of the greatest |x| read exactly (in float32), the rest is bounded by what is "
        "left of both norms. The share of neurons that is read, and in parentheses all bytes that "
        "are, as a share of the dense block's in float32."
    )
    cases = list(dict.fromkeys((row["data"], row["d"], row["bits"]) for row in rows))
    by_bound: dict[str, dict[Any, Row]] = {}
    for row in rows:
        by_bound.setdefault(row["bound"], {})[row["data"], row["d"], row["bits"]] = row
    for bits in dict.fromkeys(row["bits"] for row in rows):
        some = [case for case in cases if case[2] == bits]
        yield ""
        yield from table(
            [f"{bits} bits", *(f"{data}, d = {d}" for data, d, _ in some)],
            [
                ["positive", *(
                    f"{next(r for r in rows if (r['data'], r['d']) == case[:2])['positive']:.1%}"
                    for case in some
                )],
                *(
                    [name, *(_bound(found.get(case)) for case in some)]
                    for name, found in by_bound.items()
                ),
            ],
        )  # fmt: skip


def _bound(row: Row | None) -> str:
    return "" if row is None else f"{row['read']:.1%} ({row['bytes']:.1%})"


if __name__ == "__main__":
    print(f"wrote {write()}")
