"""The cost of da_top_k from 8 to 4,096 devices, on paper, and what compilers make of it.

`python -m benchmarks.da_top_k` writes docs/da_top_k.md and its plot: bytes, rounds and recall by
the formulas of `ops.top_k.merge` and `ops.top_k.recall`, with the tables that `make tpu`
and `python -m benchmarks.mesh` left in benchmarks/results. Nothing is run.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks import timing
from benchmarks.markdown import table
from hire_rewrite.ops.top_k.merge import Merge, cheapest, described
from hire_rewrite.ops.top_k.recall import expected_recall, kept_per_shard
from hire_rewrite.passes.draw.theme import LIGHT, for_both

VOCABULARY, ROWS, K, TARGET, HOST = 262_144, 8, 64, 0.99, 8
DEVICES = tuple(2**i for i in range(3, 13))
DOCS = Path(__file__).parents[1] / "docs"

TEXT = """\
# The greatest of a sharded axis: `da_top_k`

Written by `python -m benchmarks.da_top_k`, except for the two tables below that say otherwise.

A vocabulary head that is sharded over devices leaves on each of them the logits of its own rows. To
choose a token, only the greatest few matter. DA-TOP-k (arXiv 2402.09360) has each device select
its own greatest, and merges those: pairs of a value and a global index, 8 bytes each.

```python
values, indices = hire.da_top_k(logits, k=64, mesh=mesh, spec=P("data", "model"))
values, indices = hire.da_top_k(shard, k=64, axis_name="model")  # inside shard_map
```

`transform` puts it in place of `lax.top_k` and `lax.approx_max_k` behind a head that it rewrites
on a mesh. An arg max it leaves alone: the compiler compares one value of each device for that.
Inside a function's own `shard_map` it puts it in place of searches of logits that were gathered
(`top_k`, `approx_max_k` or `argmax` of a tiled `all_gather`), and nothing is gathered.

## How many values of each device

If the k greatest of n values lie in s shards at random, the number r of them in a shard of m is
hypergeometric. A shard that hands on q values loses r − q of them (arXiv 2506.04165):

    expected recall = 1 − (s / k) Σ_{{r > q}} (r − q) C(k, r) C(n − k, m − r) / C(n, m)

Values need not lie at random: frequent tokens have low ids, so that one device may have most of
the greatest. So misses are counted, not supposed. Each device counts its values that come before
the last one of the result; the sum of these counts, less k − 1, is how many were missed. Where a
row missed more than `recall_target` allows, the call merges lists of k, which is exact. **The
recall of every row is at least the target, whatever the data**, and the greatest value is never
lost. q is chosen so that of a thousand rows whose values lie at random one is merged again.

The head keeps the vocabulary in its order, and does not interleave its rows over the devices:
logits then come out as the model had them, sharded over the vocabulary, without a byte between
devices, and the model's own code behind them (masks, biases, noise) works on them as it is.
Interleaved rows would need an exchange of all logits for that. The price is that placement is not
random, for which the count above is there.

## Two ways to merge

* **gather**: one all-gather; each device receives (s − 1) q pairs and sorts them.
* **butterfly**: rounds in which the lists of 1, 2, 4, ... neighbors are merged, each a permutation
  of lists no longer than k. (s need be no power of two.)

Over several axes of a mesh either all are one, or each is merged before the next, the last axis
first: between hosts then travel k pairs, not those of all their chips. A model of the time, in
`hire_rewrite/ops/top_k/merge.py`, chooses: 5 µs for each collective, 1 µs for each transfer,
45 GB/s, and 20 times as much between hosts. These are assumptions, made to tell few from many;
`merge=` says otherwise.

## On paper

{rows} rows of {vocabulary:,} float32 logits, k = {k}, `recall_target={target}`; bytes that reach
one device.

{paper}

![bytes by devices](da_top_k.svg)

## What compilers make of it

{tpu}

{mesh}
"""


def main() -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.da_top_k", description=__doc__).parse_args()
    rows = [_row(devices) for devices in DEVICES]
    _plot(rows)
    page = TEXT.format(
        rows=ROWS,
        vocabulary=VOCABULARY,
        k=K,
        target=TARGET,
        paper=_table(rows),
        tpu=_tpu(timing.read("tpu")),
        mesh=_mesh(timing.read("mesh")),
    )
    (DOCS / "da_top_k.md").write_text(page)
    print(f"written to {DOCS / 'da_top_k.md'}")


def _row(devices: int) -> dict[str, Any]:
    """All ways to find the greatest of a vocabulary on so many devices, HOST to a host."""
    kept, share = kept_per_shard(VOCABULARY, K, devices, TARGET), -(-K // devices)
    axes, sizes = ("host", "chip"), (max(1, devices // HOST), min(devices, HOST))

    def one(how: str, count: int) -> Merge:
        return cheapest(("x",), (devices,), count, K, rows=ROWS, how=how)

    chosen = cheapest(axes, sizes, kept, K, rows=ROWS, slow=("host",))
    return {
        "devices": devices,
        "all logits": VOCABULARY * 4 * ROWS * (devices - 1) // devices,
        "kept": kept,
        "expected recall": f"{expected_recall(VOCABULARY, K, devices, kept):.5f}",
        "with the share of each": f"{expected_recall(VOCABULARY, K, devices, share):.3f}",
        "gather of k": _bytes(one("gather", min(K, VOCABULARY // devices))),
        "gather": _bytes(one("gather", kept)),
        "butterfly": _bytes(one("butterfly", kept)),
        "rounds": sum(len(level.lists) for level in one("butterfly", kept)),
        "by host": sum(ROWS * 8 * level.pairs for level in chosen),
        "chosen for hosts of 8": described(chosen, ROWS),
    }


def _bytes(merge: Merge) -> int:
    return sum(ROWS * 8 * level.pairs for level in merge)


def _plot(rows: list[dict[str, Any]]) -> None:
    plt.rcParams["svg.hashsalt"] = "da_top_k"  # the same file each time
    inks = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    papers = ("figure.facecolor", "axes.facecolor", "legend.facecolor")
    colors: dict[Any, Any] = {"legend.edgecolor": LIGHT.edge}
    colors |= dict.fromkeys(inks, LIGHT.ink) | dict.fromkeys(papers, LIGHT.page)
    plt.rcParams.update(colors)
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for name in ("all logits", "gather of k", "gather", "butterfly", "by host"):
        axes.plot(DEVICES, [row[name] for row in rows], marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("devices")
    axes.set_ylabel("bytes that reach one device")
    axes.legend()
    figure.tight_layout()
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata={"Date": None})
    (DOCS / "da_top_k.svg").write_text(for_both(written.getvalue()), encoding="utf-8")


def _tpu(result: dict[str, Any]) -> str:
    intro = (
        f"Programs for TPU, compiled by libtpu {result['libtpu']} with jax {result['jax']} and not "
        f"run (`make tpu`): the results of all collectives on one device, {ROWS} rows. Branches "
        "that hardly a call takes (the second merge) are counted apart. This compiler divides "
        "`lax.top_k` among chips by itself; the one for CPU gathers all logits for it, "
        f"{VOCABULARY * 4 * ROWS:,} bytes."
    )
    return "\n\n".join([intro, _table(result["programs"])])


def _mesh(result: dict[str, Any]) -> str:
    intro = (
        "SmolLM2-135M with its vocabulary and FFNs on eight CPU devices, following the greedy "
        "tokens of the rewritten model on one device (`python -m benchmarks.mesh`). With a quarter "
        "of its neurons, for which it was not trained, near ties are common, and rounding decides "
        "them: stored in shards, the residual stream is sharded too, and its norms are summed in "
        "another order (the dense model's logits then differ by 6e-5, the rewritten one's by "
        "2e-5)."
    )
    return "\n\n".join([intro, _table(result["rows"])])


def _table(rows: list[dict[str, Any]]) -> str:
    return "\n".join(table(list(rows[0]), (list(map(_text, row.values())) for row in rows)))


def _text(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    main()
