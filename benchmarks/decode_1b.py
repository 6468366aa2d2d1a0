"""A decode step of a 1.24 B decoder: dense, rewritten, and with HiRE written by hand.

`python -m benchmarks.decode_1b` writes `results/decode_1b.json`. The model has the sizes of
Llama-3.2-1B and random float32 weights, so that nothing is said of recall; it is the code of
`examples/smollm2`, which knows nothing of rewriting. By hand (`benchmarks.decode_1b_by_hand`) the
same operations are called on the same packed arrays: what the rewritten step takes longer is the
rewriter's doing. PyTorch, where it is installed, is measured beside them, in float32 and
dynamically quantized to 8 bits. `--ways` measures some alone, and writes nothing. It needs 20 GB
of memory.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import hire_rewrite as hire
from benchmarks import peers, timing
from benchmarks.decode_1b_by_hand import by_hand
from examples.smollm2 import model
from hire_rewrite.packed import Packed
from hire_rewrite.plan import table
from hire_rewrite.rules import Rule
from hire_rewrite.transformed import Transformed

LLAMA_1B = model.Config(
    vocab=128_256,
    d_model=2048,
    d_ff=8192,
    layers=16,
    heads=32,
    kv_heads=8,
    rope_base=5e5,
    norm_eps=1e-5,
)
LENGTH = 256  # tokens that the cache has room for
BATCHES = (1, 2, 4, 8)
HEAD = hire.Head(k=64, candidates=1024, predictor=hire.LowRank(256))


def block(predictor: hire.LowRank | hire.Quantized) -> hire.FFN:
    """5 % of the neurons of 10 % candidates."""
    return hire.FFN(k=0.05, candidates=0.10, predictor=predictor)


def every(bits: int) -> hire.Linear:
    """All layers that no other rule asks for, in so many bits."""
    return hire.Linear(encoding=hire.Blocks(bits), round_inputs=True, force=True)


WAYS: dict[str, tuple[Rule, ...]] = {
    "FFN of 5 % by LowRank(128)": (block(hire.LowRank(128)), HEAD),
    "FFN of 5 % by Quantized(4)": (block(hire.Quantized(4)), HEAD),
    "8 bits everywhere": (every(8),),
    "8 bits everywhere, head by Quantized(8)": (every(8), hire.Head(predictor=hire.Quantized(8))),
    "4 bits everywhere": (every(4), hire.Head(predictor=hire.Quantized(4))),
    "4 bits, FFN of 5 % by LowRank(128)": (block(hire.LowRank(128)), every(4), HEAD),
    "4 bits, FFN of 5 % by Quantized(4)": (block(hire.Quantized(4)), every(4), HEAD),
}
"""What is rewritten, by name: to add a way is to add a line."""


def random_weights(config: model.Config) -> dict[str, Any]:
    """Normally distributed weights, of such a size that activations neither grow nor vanish."""
    keys = iter(jax.random.split(jax.random.key(0), 8))
    d, f, kv = config.d_model, config.d_ff, config.kv_heads * config.head_dim

    def normal(*shape: int) -> Array:
        return jax.random.normal(next(keys), shape, jnp.float32) / shape[-2] ** 0.5

    layers = {
        "wq": normal(config.layers, d, d),
        "wk": normal(config.layers, d, kv),
        "wv": normal(config.layers, d, kv),
        "wo": normal(config.layers, d, d),
        "w_gate": normal(config.layers, d, f),
        "w_up": normal(config.layers, d, f),
        "w_down": normal(config.layers, f, d),
        "attn_norm": jnp.ones((config.layers, d)),
        "ffn_norm": jnp.ones((config.layers, d)),
    }
    embed = jax.random.normal(next(keys), (config.vocab, d)) / d**0.5
    return {"embed": embed, "layers": layers, "final_norm": jnp.ones(d)}


def measure(
    config: model.Config,
    params: Any,
    way: str,
    batch: int,
    step: Transformed,
    packed: Packed,
    others: Mapping[str, Callable[[int, int], Callable[[], Any]]],
    rounds: int,
) -> dict[str, Any]:
    """All sides at one batch size."""
    dense = functools.partial(model.decode_step, config)
    token, cache = jnp.arange(batch) * 1000, model.init_cache(config, batch, LENGTH)
    hand = by_hand(config, step, packed, token, cache)
    sides: dict[str, Callable[[], Any]] = {
        "dense": functools.partial(jax.jit(dense), params, token, cache),
        "rewritten": functools.partial(jax.jit(step.__call__), packed, token, cache),
        "by hand": functools.partial(jax.jit(hand), packed, token, cache),
        **{name: make(batch, LENGTH) for name, make in others.items()},
    }
    same = jnp.abs(sides["rewritten"]()[0] - sides["by hand"]()[0]).max()
    bandwidth = timing.bandwidth()
    timings = timing.alternate(sides, rounds)
    sites = step.plan(packed, token, cache).sites
    saved = sum(site.bytes_before - site.bytes_after for site in sites)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return {
        "batch": batch,
        "way": way,
        "sites": summary(sites),
        "MB dense": round(whole / 1e6),
        "MB rewritten": round((whole - saved) / 1e6),
        "floor ms": round((whole - saved) / bandwidth * 1e3, 2),
        **{f"{name} ms": round(timings.median(name) * 1e3, 2) for name in sides},
        "spread": round(timings.spread("rewritten"), 3),
        "times dense": round(timings.ratio("dense", "rewritten"), 2),
        "times by hand": round(timings.ratio("by hand", "rewritten"), 3),
        "from by hand": float(same),
        **{f"times {name}": round(timings.ratio(name, "rewritten"), 2) for name in others},
    }


def summary(sites: Sequence[hire.Site]) -> str:
    """How many sites of each kind are rewritten, and which are dense though a rule asks for them.

    Example:
      "1 head, 1 ffn, 4 linear"
    """
    kinds = Counter(site.kind for site in sites if site.status == "rewritten")
    dense = [f"{site.name} dense" for site in sites if site.status == "dense" and site.rule]
    return ", ".join([*(f"{count} {kind}" for kind, count in kinds.items()), *dense])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--layers", type=int, default=LLAMA_1B.layers)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    options = parser.parse_args()
    whole = options == parser.parse_args(["--rounds", str(options.rounds)])
    config = model.Config(**(vars(LLAMA_1B) | {"layers": options.layers}))
    params = random_weights(config)
    made = peers.build("decoders", "torch_decoder", config, params)
    others = {} if isinstance(made, str) else made
    dense, rows, packing = functools.partial(model.decode_step, config), [], {}
    example = (jnp.zeros(1, jnp.int32), model.init_cache(config, 1, LENGTH))
    for way in options.ways:
        step = hire.transform(dense, *WAYS[way])
        start = time.perf_counter()
        packed = jax.block_until_ready(step.pack(params, *example))
        packing[way] = round(time.perf_counter() - start, 1)
        print(step.plan(packed, *example))
        for batch in options.batches:
            rows.append(measure(config, params, way, batch, step, packed, others, options.rounds))
            print(rows[-1], flush=True)
        del packed
        jax.clear_caches()
    rules = {way: [str(rule) for rule in WAYS[way]] for way in options.ways}
    result = {"layers": config.layers, "rules": rules, "packing s": packing, "rows": rows}
    if isinstance(made, str):
        result["torch"] = made
    if whole:
        path = timing.write("decode_1b", result, "python -m benchmarks.decode_1b")
        print(f"wrote {path}")
    header = list(rows[0])
    print(table([header, *([str(row[name]) for name in header] for row in rows)]))


if __name__ == "__main__":
    main()
