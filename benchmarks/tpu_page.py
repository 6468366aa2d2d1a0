"""The text of docs/tpu.md, from what `benchmarks.tpu_bytes` counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.decode_1b import LENGTH
from benchmarks.markdown import table
from benchmarks.tpu_account import BANDWIDTH, CLOCK


def page(result: dict[str, Any]) -> str:
    """The text of docs/tpu.md."""
    parts = ["FFN, scoring", "FFN", "head, scoring", "head", "attention", "cache and other"]
    header = ["batch", "step", "GB", "of dense", "ms", *(f"{part}, MB" for part in parts)]
    steps = [
        [
            row["batch"],
            row["step"],
            row["GB"],
            f"{row['of dense']:.1%}",
            row["ms"],
            *(row["sites MB"].get(part, "") for part in parts),
        ]
        for row in result["steps"]
    ]
    scratch = max(row["scratch MB"] for row in result["steps"] if row["batch"] == 1)
    alone, scores, relu, lists = (result[part] for part in ("alone", "scoring", "relu", "lists"))
    return f"""# TPU, by account

Compiled for a v5e by its own compiler (libtpu {result["libtpu"]}, jax {result["jax"]}), \
**not run**: there was no TPU. `make tpu` writes this page and \
[tpu_bytes.json](../benchmarks/results/tpu_bytes.json).

What is counted are the bytes that a program moves to and from HBM, read from its compiled text \
([benchmarks/hbm.py](../benchmarks/hbm.py)): operands and results in HBM, bodies of loops as often \
as they run, slices and gathers by what they take, copies into VMEM where they start; traffic of \
VMEM apart. A kernel is opaque and counts with what it declares, which is what its grid reads (the \
tests compare both). Milliseconds are these bytes at {BANDWIDTH / 1e9:.0f} GB/s, and nothing else: \
not what a step takes, but what it takes at least.

## A decode step of a 1.24 B decoder

The sizes of Llama-3.2-1B, weights and cache in bfloat16, {LENGTH} tokens of cache; \
`FFN(k=0.05, candidates=0.10)` with the predictor that is named, or all layers compressed: in 8 \
bits a row with 2 % of the neurons and inputs from rows of 8 bits, in 4 bits in blocks of 32 with \
5 %; always `Head(k=64, candidates=1024, predictor=LowRank(256))`. "JAX" is what XLA makes of the \
rewritten step alone, "kernels" has those of `ops.kernels.tpu`. Of recall nothing is said: see \
[quality.md](quality.md).

{markdown(header, steps)}

The programs of batch 1 need at most {scratch} MB in HBM beside their arguments and results: no \
weight is copied. With more tokens the rows of all of them are fetched, up to as many as the \
tokens together may ask for.

## Layers that are in no loop

Where a weight is one of a stack that does not fit into VMEM, XLA gathers its rows from HBM. A \
weight that fits it brings into VMEM whole, and gathers from there. The kernels have theirs pinned \
to HBM, and copy the groups (8 to 64 rows) whose numbers they find in scalar memory, a chunk ahead \
of the product. Single rows of bfloat16 cannot be copied, only the 8 of a tile, so for heads that \
do not fit into VMEM XLA's gather remains. One token, `LowRank(128)`, MB moved:

{markdown(list(alone[0]), [list(row.values()) for row in alone])}

## Blocks without their zeros

A ReLU block in bfloat16, MB moved by a layer of several in a loop; `FFN(k="positive")` with its \
default budget of half of the neurons, [told or proved](relu.md). **Of the expected count**: \
"rows read" is the share of a token's neurons that [relu.md](relu.md) measured, and the bytes are \
those of the rows of so many, for each token its own. "Full list" is what the program moves where \
each token has as many as the budget. XLA's gather, of the same arrays, reads the full list \
always, and but for one token of the smaller block writes a copy of it in float32. The kernels \
stop where a list ends: its length is in scalar memory, nothing is copied behind it, and chunks \
that lie there are passed over. A token with more neurons than the budget makes the call read all \
rows, which is not counted here.

{markdown(list(relu[0]), [list(row.values()) for row in relu])}

"Default" is what a plan for a v5e does where such a share is positive, without `force`: its \
estimates lean towards dense, for nothing has been timed. Each row is a copy of its own, and \
what starting one takes is not in these bytes.

A copy takes rows of float32, but of bfloat16 no single one: the numbers of two neighbors lie in \
one word. So where a plan is for TPU single rows are stored as `ops.encodings.Words`, the two \
numbers of a word from the same row. Rows in integers XLA gathers, and the whole budget counts.

Lists are made of masks by XLA's own sort, not by a scatter as elsewhere. There is no kernel in \
Pallas for it: it would go from neuron to neuron in scalar code, thousands of steps of several \
cycles each, which is no less than what the compiler thinks that the sort takes (a list of half of \
the places, at {CLOCK / 1e9:.1f} GHz):

{markdown(list(lists[0]), [list(row.values()) for row in lists])}

## Scoring

One layer's predictor for both matrices of the block above, 16,384 rows of 2048. XLA's form reads \
int8 once, but for one token it widens and multiplies it in vector units; int4 it brings into \
VMEM, and transposes and unpacks it there. The last column is what the compiler thinks that XLA's \
form takes, at {CLOCK / 1e9:.1f} GHz; of the kernels it thinks nothing.

{markdown(list(scores[0]), [list(row.values()) for row in scores])}

## What is not done

Kernels take bfloat16 rows of a multiple of 128 columns in groups of a multiple of 8 (int8 and \
int4 rows for scoring as well), and single rows of float32 or in words. Others run in JAX alone, \
and so do weights that the compiler divides among chips, exported programs, and batches of weights \
(`vmap`). Inside `shard_map` over all axes of the mesh kernels are used. For v5p the same programs \
compile, but libtpu does not give the text of all of them back. On GPU everything is plain XLA.
"""


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    return "\n".join(table(header, (list(map(str, row)) for row in rows)))
