"""A decode step of a 1.24 B decoder: dense, rewritten, and with HiRE written by hand.

`python -m benchmarks.decode_1b` writes `results/decode_1b.json`. The model has the sizes of
Llama-3.2-1B and random float32 weights, so that nothing is said of recall; it is the code of
`examples/smollm2`, which knows nothing of rewriting. By hand the same operations (`ops.hire_ffn`,
`ops.hire_head`) are called on the same packed arrays: what the rewritten step takes longer is the
rewriter's doing. PyTorch, where it is installed, is measured beside them, in float32 and
dynamically quantized to 8 bits. It needs 20 GB of memory.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

import hire_rewrite as hire
from benchmarks import peers, timing
from examples.layers import attend_cache, remember, rms_norm
from examples.smollm2 import model
from hire_rewrite.ops.ffn.ffn import hire_ffn
from hire_rewrite.ops.head.head import hire_head
from hire_rewrite.packed import Packed
from hire_rewrite.plan import table
from hire_rewrite.sites.ffn.operation import FFNOperation
from hire_rewrite.sites.head.operation import HeadOperation
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
BLOCKS = tuple(
    hire.FFN(k=0.05, candidates=0.10, predictor=predictor)
    for predictor in (hire.LowRank(128), hire.Quantized(4))
)
HEAD = hire.Head(k=64, candidates=1024, predictor=hire.LowRank(256))


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


def by_hand(config: model.Config, step: Transformed, *args: Any) -> Callable[..., Any]:
    """The step as somebody would write it who knows `hire_rewrite.ops`.

    Args:
      args: of a call of `step`, which says which sizes it has chosen.
    """
    analysis = step._analyses.of(args[0], args, {})
    decisions = {decision.site.kind.name: decision for decision in analysis.decisions}
    block, head = decisions["ffn"].op, decisions["head"].op
    assert isinstance(block, FFNOperation)
    assert isinstance(head, HeadOperation)
    block_rows, head_rows = decisions["ffn"].packed_name, decisions["head"].packed_name

    def run(packed: Packed, token: Array, cache: model.Cache) -> tuple[Array, model.Cache]:
        weights: dict[str, Any] = {}
        for path, array in packed.weights.items():
            weights[path.removeprefix("params/")] = array
        names = ("wq", "wk", "wv", "wo", "attn_norm", "ffn_norm")
        layers = {name: weights[f"layers/{name}"] for name in names}
        pos, length = cache["pos"], cache["v"].shape[3]
        positions, filled = pos + jnp.arange(1), pos + 1
        mask = positions[:, None] >= jnp.arange(length)

        def layer(carry: Any, scanned: Any) -> tuple[Any, None]:
            x, keys, values = carry
            w, index = scanned
            q, k, v = model._qkv(config, w, x, positions)
            keys, values = remember((keys, values), index, pos, k, v)
            x = x + attend_cache(q, (keys, values), index, filled, mask) @ w["wo"]
            h = rms_norm(x, w["ffn_norm"], config.norm_eps)[:, 0]
            y = hire_ffn(
                h,
                packed.sites[block_rows],
                index,
                spec=block.spec,
                activation=lambda pre, _: jax.nn.silu(pre[gate]) * pre[1 - gate],
                predictor=block.rule.predictor,
                budget=block.budget,
            )
            return (x + y[:, None], keys, values), None

        gate = block.spec.gate
        carry = (weights["embed"][token[:, None]], cache["k"], cache["v"])
        (x, keys, values), _ = lax.scan(layer, carry, (layers, jnp.arange(config.layers)))
        x = rms_norm(x, weights["final_norm"], config.norm_eps)[:, 0]
        (logits,) = hire_head(
            x,
            packed.sites[head_rows],
            0,
            spec=head.spec,
            endpoints=lambda z: (z,),
            predictor=head.rule.predictor,
        )
        return logits, {"k": keys, "v": values, "pos": pos + 1}

    return run


def measure(
    config: model.Config,
    params: Any,
    rule: hire.FFN,
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
        "blocks by": str(rule.predictor),
        "sites": ", ".join(f"{site.kind} {site.status}" for site in sites),
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--layers", type=int, default=LLAMA_1B.layers)
    options = parser.parse_args()
    config = model.Config(**(vars(LLAMA_1B) | {"layers": options.layers}))
    params = random_weights(config)
    others = peers.build("decoders", "torch_decoder", config, params)
    dense, rows, packing = functools.partial(model.decode_step, config), [], {}
    example = (jnp.zeros(1, jnp.int32), model.init_cache(config, 1, LENGTH))
    for rule in BLOCKS:
        step = hire.transform(dense, rule, HEAD)
        start = time.perf_counter()
        packed = jax.block_until_ready(step.pack(params, *example))
        packing[str(rule.predictor)] = round(time.perf_counter() - start, 1)
        print(step.plan(params, *example))
        for batch in BATCHES:
            given = {} if isinstance(others, str) else others
            rows.append(measure(config, params, rule, batch, step, packed, given, options.rounds))
            print(rows[-1], flush=True)
        del packed
        jax.clear_caches()
    result = {"layers": config.layers, "packing s": packing, "rows": rows}
    if isinstance(others, str):
        result["torch"] = others
    if config == LLAMA_1B:
        path = timing.write("decode_1b", result, "python -m benchmarks.decode_1b")
        print(f"wrote {path}")
    header = list(rows[0])
    print(table([header, *([str(row[name]) for name in header] for row in rows)]))


if __name__ == "__main__":
    main()
