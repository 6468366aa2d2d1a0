"""What the pass costs: an unrolled decoder of 12 to 96 layers is traced, detected and rewritten.

`python -m benchmarks.passes` compares it with `jax.make_jaxpr` of the same function, which any
compilation needs, and writes `results/passes.json`. The time must grow with the layers, not with
their square, and stay below twice that of `make_jaxpr` plus two seconds.
"""

import argparse
import statistics
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import hire_rewrite as hire
from benchmarks import timing
from hire_rewrite.graph.trace import trace
from hire_rewrite.passes.detect import detect
from hire_rewrite.plan import table

LAYERS = (12, 24, 48, 96)
D, HEADS, WIDTH, VOCABULARY, LENGTH, BATCH = 64, 4, 256, 8192, 16, 2
RULES = (hire.FFN(k=0.05, force=True), hire.Head(k=64, force=True))
LIMIT = (2.0, 2.0)  # times make_jaxpr, and seconds


def _norm(x: Array, scale: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * scale


def _rotate(x: Array, position: Array) -> Array:
    frequency = 1e4 ** -(jnp.arange(0, x.shape[-1], 2) / x.shape[-1])
    angle = position[:, None, None] * frequency
    a, b = jnp.split(x, 2, -1)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def _attend(w: Any, x: Array, position: Array, cache: Any) -> tuple[Array, Any]:
    def store(whole: Array, new: Array, i: Array) -> Array:
        return jax.lax.dynamic_update_slice(whole, new[None], (i, 0, 0))

    heads = (len(x), HEADS, -1)
    q, k, v = (jnp.reshape(x @ w[name], heads) for name in "qkv")
    q, k = _rotate(q, position), _rotate(k, position)
    keys, values = (
        jax.vmap(store)(old, new, position) for old, new in zip(cache, (k, v), strict=True)
    )
    scores = jnp.einsum("bhd,bthd->bht", q, keys) / q.shape[-1] ** 0.5
    seen = jnp.arange(LENGTH) <= position[:, None, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, -1e9))
    return jnp.einsum("bht,bthd->bhd", weights, values).reshape(len(x), -1) @ w["o"], (keys, values)


def decode(params: Any, token: Array, position: Array, cache: Any) -> tuple[Array, Any]:
    """A decode step whose layers are written out one by one."""
    x, new = params["embed"][token], []
    for w, old in zip(params["layers"], cache, strict=True):
        attended, kept = _attend(w, _norm(x, w["n1"]), position, old)
        new.append(kept)
        x = x + attended
        h = _norm(x, w["n2"])
        x = x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"]
    return jnp.argmax(_norm(x, params["norm"]) @ params["embed"].T, -1), new


def shapes(layers: int) -> tuple[Any, ...]:
    def f32(*size: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(size, jnp.float32)

    layer = {name: f32(D, D) for name in "qkvo"} | {"n1": f32(D), "n2": f32(D)}
    layer |= {"gate": f32(D, WIDTH), "up": f32(D, WIDTH), "down": f32(WIDTH, D)}
    params = {"embed": f32(VOCABULARY, D), "norm": f32(D), "layers": [layer] * layers}
    tokens = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    return params, tokens, tokens, [(f32(BATCH, LENGTH, HEADS, D // HEADS),) * 2] * layers


def measure(layers: int, rounds: int) -> dict[str, Any]:
    args = shapes(layers)
    step = hire.transform(decode, *RULES)
    packed = jax.eval_shape(lambda params: step.pack(params, *args[1:]), args[0])

    def again() -> Any:
        """The function under a new identity, so that nothing is remembered of it."""
        return lambda *operands: decode(*operands)

    def rewrite() -> Any:
        return jax.make_jaxpr(lambda *rest: step(*rest))(packed, *args[1:])

    traced = trace(again(), args, {}, (0,))
    timings = timing.alternate(
        {
            "make_jaxpr": lambda: (jax.make_jaxpr(again())(*args), None)[1],
            "trace": lambda: (trace(again(), args, {}, (0,)), None)[1],
            "detect": lambda: (detect(traced), None)[1],
            "rewrite": lambda: (rewrite(), None)[1],
        },
        rounds,
    )
    sites = len(step.plan(*args).sites)
    assert sites == layers + 1
    whole = [sum(parts) for parts in zip(*(timings.seconds[s] for s in SIDES[1:]), strict=True)]
    limit = LIMIT[0] * timings.median("make_jaxpr") + LIMIT[1]
    return {
        "layers": layers,
        "equations": sum(len(scope.nodes) for scope in traced.scope.walk()),
        "sites": sites,
        "timings": timings.summary(),
        "pass_ms": round(1e3 * statistics.median(whole), 1),
        "limit_ms": round(1e3 * limit, 1),
        "within": statistics.median(whole) <= limit,
    }


SIDES = ("make_jaxpr", "trace", "detect", "rewrite")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    results = [measure(layers, rounds) for layers in LAYERS]
    header = ["layers", "equations", *(f"{side} ms" for side in SIDES), "pass ms", "limit ms"]
    rows = [
        [str(r["layers"]), str(r["equations"])]
        + [f"{r['timings'][side]['median_ms']:.0f}" for side in SIDES]
        + [f"{r['pass_ms']:.0f}", f"{r['limit_ms']:.0f}"]
        for r in results
    ]
    print(table([header, *rows]))
    path = timing.write("passes", {"results": results}, "python -m benchmarks.passes")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
