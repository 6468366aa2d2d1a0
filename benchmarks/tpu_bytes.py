"""HBM bytes of programs for TPU, by account: compiled by the real compiler, not run.

    make tpu        # in an environment of its own, with libtpu; no TPU is needed

Decoding is bound by the bytes that are read. They are counted from the compiled programs (see
`benchmarks.hbm`): a decode step of a 1.24 B decoder, blocks and heads alone, and scoring alone;
dense, rewritten in JAX alone, and rewritten with the kernels for TPU. Written to
benchmarks/results/tpu_bytes.json and docs/tpu.md; `tests/tpu` asks for the figures that matter.
"""

from __future__ import annotations

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # libtpu would look for a TPU, and for its host
os.environ["TPU_SKIP_MDS_QUERY"] = "1"

import argparse
import dataclasses
import functools
import importlib.metadata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import hire_rewrite as hire
from benchmarks import timing
from benchmarks.decode_1b import LENGTH, LLAMA_1B
from benchmarks.hbm import Traffic, traffic
from benchmarks.markdown import table
from examples.smollm2 import model
from hire_rewrite.ops import narrow
from hire_rewrite.ops.encodings import Encoding
from hire_rewrite.ops.predictors import Predictor
from hire_rewrite.rules import Rule

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1"}
BANDWIDTH = 819e9  # bytes per second, of a v5e
CLOCK = 1.5e9  # cycles per second, of a v5e
SIDES = ("JAX", "kernels")
BATCHES = (1, 4)
BLOCK_PREDICTORS = (hire.LowRank(128), hire.Quantized(4))
HEAD = hire.Head(k=64, candidates=1024, predictor=hire.LowRank(256))


def selected(predictor: Predictor) -> hire.FFN:
    """The top 5 % of neurons alone."""
    return hire.FFN(k=0.05, candidates=0.10, predictor=predictor, force=True)


def everything(rows: Encoding, neurons: float, inputs: float) -> tuple[Rule, ...]:
    """All layers compressed, so many neurons and inputs of each token from rows of 8 bits."""
    exact = hire.Blocks(8, None, scale="bfloat16")
    block = hire.FFN(neurons, tail="predicted", encoding=rows, exact=exact, force=True)
    return block, hire.Linear(inputs, encoding=rows, exact=exact, force=True), HEAD


EIGHT, FOUR = hire.Blocks(8, None, scale="bfloat16"), hire.Blocks(4, scale="bfloat16")
RULES: dict[str, tuple[Rule, ...]] = {
    **{str(predictor): (selected(predictor), HEAD) for predictor in BLOCK_PREDICTORS},
    "LowRank(rank=128), attention in 4 bits": (
        selected(hire.LowRank(128)),
        hire.Linear(encoding=FOUR, force=True),
        HEAD,
    ),
    "8 bits, exact parts": everything(EIGHT, neurons=0.02, inputs=0.02),
    "4 bits, exact parts": everything(FOUR, neurons=0.05, inputs=0.05),
}
"""What is rewritten in the decode step, by name."""
PAGE = Path(__file__).parents[1] / "docs" / "tpu.md"


@dataclasses.dataclass(frozen=True)
class Account:
    """What a program moves in one call.

    Attributes:
      reads: bytes read of each argument that is read at all, by its path.
      other: bytes that are written, and read of what is no argument.
      kernels: how many calls of kernels the program's text has.
      scratch: bytes that it needs in HBM beside arguments and results.
      cycles: what the compiler thinks that all but the kernels takes.
    """

    reads: dict[str, int]
    other: int
    kernels: int
    scratch: int
    cycles: int

    @property
    def total(self) -> int:
        return sum(self.reads.values()) + self.other


def shapes_for(chip: str) -> Callable[..., jax.ShapeDtypeStruct]:
    """Makes arguments on one chip: `shapes_for("v5e")(2, 3, dtype=jnp.int8)`."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip]).devices[0]
    sharding = SingleDeviceSharding(device)

    def shape(*sizes: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    return shape


def program(function: Callable[..., Any], *args: Any, side: str = "kernels") -> Any:
    """The compiled program, with the kernels or in JAX alone."""
    with mock.patch.dict(os.environ, HIRE_REWRITE_KERNELS="1" if side == "kernels" else "0"):
        lowered = jax.jit(lambda *args: function(*args), keep_unused=True).trace(*args)
        return lowered.lower(lowering_platforms=("tpu",)).compile()


def account(compiled: Any, *args: Any) -> Account:
    """The account of a program that `program` compiled for these arguments."""
    text = compiled.as_text() or ""
    leaves = jax.tree_util.tree_leaves_with_path(args)
    found: Sequence[Traffic] = traffic(text)
    reads: dict[str, int] = {}
    for one in found:
        if one.argument is not None:
            path = jax.tree_util.keystr(leaves[one.argument][0])
            reads[path] = reads.get(path, 0) + one.read
    return Account(
        reads,
        sum(one.written + (one.read if one.argument is None else 0) for one in found),
        text.count('custom_call_target="tpu_custom_call"'),
        compiled.memory_analysis().temp_size_in_bytes,
        sum(one.cycles for one in found),
    )


def decode(shape: Callable[..., Any], batch: int, config: model.Config = LLAMA_1B) -> Any:
    """The decode step and its arguments, in bfloat16."""
    d, f, kv, n = config.d_model, config.d_ff, config.kv_heads * config.head_dim, config.layers
    layers = {
        "wq": shape(n, d, d),
        "wk": shape(n, d, kv),
        "wv": shape(n, d, kv),
        "wo": shape(n, d, d),
        "w_gate": shape(n, d, f),
        "w_up": shape(n, d, f),
        "w_down": shape(n, f, d),
        "attn_norm": shape(n, d),
        "ffn_norm": shape(n, d),
    }
    params = {"embed": shape(config.vocab, d), "layers": layers, "final_norm": shape(d)}
    cache = jax.eval_shape(lambda: model.init_cache(config, batch, LENGTH, jnp.bfloat16))
    cache = jax.tree.map(lambda array: shape(*array.shape, dtype=array.dtype), cache)
    args = (params, shape(batch, dtype=jnp.int32), cache)
    return functools.partial(model.decode_step, config), args


def block(shape: Callable[..., Any], batch: int) -> Any:
    """A gated block that is not one of a stack, and its arguments."""
    weights = {"gate": shape(2048, 8192), "up": shape(2048, 8192), "down": shape(8192, 2048)}

    def run(w: Any, x: Any) -> Any:
        return (jax.nn.silu(x @ w["gate"]) * (x @ w["up"])) @ w["down"]

    return run, (weights, shape(batch, 2048))


def head(shape: Callable[..., Any], batch: int) -> Any:
    """A head that fits into VMEM, and its arguments."""
    return lambda w, x: x @ w.T, (shape(32_000, 1024), shape(batch, 1024))


def rewritten(
    function: Any, args: Sequence[Any], shape: Callable[..., Any], rules: Sequence[Rule]
) -> tuple[Any, ...]:
    """The rewritten function, and its arguments with the shapes of a `Packed`."""
    run = hire.transform(function, *rules)
    packed = jax.tree.map(lambda leaf: shape(*leaf.shape, dtype=leaf.dtype), run.pack(*args))
    return run, packed, *args[1:]


def site_of(path: str) -> str:
    """Which part of the decode step an argument belongs to."""
    parts = {
        "FFN, scoring": ("w_down'].predictor",),
        "FFN": ("w_gate", "w_up", "w_down"),
        "head, scoring": ("embed'].predictor",),
        "head": ("embed",),
        "attention": ("wq", "wk", "wv", "wo"),
    }
    for name, keys in parts.items():
        if any(key in path for key in keys):
            return name
    return "cache and other"


def by_site(found: Account) -> dict[str, int]:
    """Bytes by part of the decode step."""
    total: dict[str, int] = {"cache and other": found.other}
    for path, read in found.reads.items():
        total[site_of(path)] = total.get(site_of(path), 0) + read
    return total


def steps(shape: Callable[..., Any]) -> list[dict[str, Any]]:
    """The decode step, by batch, predictor and side."""
    rows = []
    for batch in BATCHES:
        function, args = decode(shape, batch)
        dense = account(program(function, *args), *args)
        rows.append({"batch": batch, "step": "dense", **figures(dense, dense)})
        for name, rules in RULES.items():
            for side in SIDES:
                run, *given = rewritten(function, args, shape, rules)
                found = account(program(run, *given, side=side), *given)
                row = {"batch": batch, "step": f"{name}, {side}"}
                rows.append({**row, **figures(found, dense)})
                print(rows[-1], flush=True)
    return rows


def alone(shape: Callable[..., Any]) -> list[dict[str, Any]]:
    """A block and a head that are in no loop."""
    rows = []
    for name, build in (("block 2048 → 8192", block), ("head 1024 → 32000", head)):
        function, args = build(shape, 1)
        dense = account(program(function, *args), *args)
        row = {"layer": name, "dense MB": mega(dense.total)}
        for side in SIDES:
            rules = (selected(hire.LowRank(128)), HEAD)
            run, *given = rewritten(function, args, shape, rules)
            row[f"{side} MB"] = mega(account(program(run, *given, side=side), *given).total)
        rows.append(row)
        print(row, flush=True)
    return rows


def scoring(shape: Callable[..., Any]) -> list[dict[str, Any]]:
    """All rows of one of 16 layers, [16384, 2048]: what is moved, and how long XLA's form takes."""
    layers, n, d = 16, 16_384, 2048
    layer = shape(dtype=jnp.int32)
    packed, scale = shape(layers, n, d // 2, dtype=jnp.int8), shape(layers, n, d // 32)
    forms: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "int8": (narrow.matmul, (shape(layers, n, d, dtype=jnp.int8), layer)),
        "int4": (narrow.block_matmul, (packed, scale, layer)),
    }
    rows = []
    for name, (function, args) in forms.items():
        for tokens in (1, 8):
            given = (shape(tokens, d, dtype=jnp.float32), *args)
            plain = account(program(function, *given, side="JAX"), *given)
            mine = account(program(function, *given), *given)
            row = {
                "rows": name,
                "tokens": tokens,
                "JAX MB": mega(plain.total),
                "kernel MB": mega(mine.total),
                "kernel's bytes ms": round(mine.total / BANDWIDTH * 1e3, 3),
                "JAX cycles ms": round(plain.cycles / CLOCK * 1e3, 3),
            }
            rows.append(row)
            print(row, flush=True)
    return rows


def figures(found: Account, dense: Account) -> dict[str, Any]:
    return {
        "GB": round(found.total / 1e9, 3),
        "of dense": round(found.total / dense.total, 3),
        "ms": round(found.total / BANDWIDTH * 1e3, 2),
        "kernels": found.kernels,
        "scratch MB": mega(found.scratch),
        "sites MB": {name: mega(read) for name, read in sorted(by_site(found).items())},
    }


def mega(size: int) -> float:
    return round(size / 1e6, 1)


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
    alone, scores = result["alone"], result["scoring"]
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

## Scoring

One layer's predictor for both matrices of the block above, 16,384 rows of 2048. XLA's form reads \
int8 once, but for one token it widens and multiplies it in vector units; int4 it brings into \
VMEM, and transposes and unpacks it there. The last column is what the compiler thinks that XLA's \
form takes, at {CLOCK / 1e9:.1f} GHz; of the kernels it thinks nothing.

{markdown(list(scores[0]), [list(row.values()) for row in scores])}

## What is not done

Kernels take bfloat16 rows of a multiple of 128 columns in groups of a multiple of 8 (int8 and \
int4 rows for scoring as well). Others run in JAX alone, and so do weights that the compiler \
divides among chips, exported programs, and batches of weights (`vmap`). Inside `shard_map` over \
all axes of the mesh kernels are used. For v5p the same programs compile, but libtpu does not give \
the text of all of them back. On GPU everything is plain XLA.
"""


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    return "\n".join(table(header, (list(map(str, row)) for row in rows)))


def main() -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.tpu_bytes", description=__doc__).parse_args()
    shape = shapes_for("v5e")
    versions = {"libtpu": importlib.metadata.version("libtpu"), "jax": jax.__version__}
    result = {
        **versions,
        "steps": steps(shape),
        "alone": alone(shape),
        "scoring": scoring(shape),
    }
    print(f"written to {timing.write('tpu_bytes', result, 'make tpu')}")
    PAGE.write_text(page(result), encoding="utf-8")


if __name__ == "__main__":
    main()
