"""Products of tokens with rows in 8 and 4 bits, beside those of torch and onnxruntime.

`python -m benchmarks.products` writes `results/products.json`: every side multiplies the same
tokens with the same rows, n × d random numbers, and returns all products. They alternate, with cold
caches.
Torch's int8 has a scale for each row, and one for all inputs of a call. The 4 bits of onnxruntime
have a float32 scale for 32 columns and inputs rounded as ours.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import hire_rewrite as hire
from benchmarks import peers, timing
from hire_rewrite.ops import kernels
from hire_rewrite.ops.encodings import Encoding, Float
from hire_rewrite.plan import table

SIZES = ((32_768, 2048), (16_384, 4096))
TOKENS = (1, 4, 8)
ROUNDS = 31
DENSE = "jax float32"
OWN: dict[str, tuple[Encoding, bool]] = {
    "8 bits": (hire.Blocks(8), True),
    "8 bits a row": (hire.Blocks(8, None), True),
    "4 bits": (hire.Blocks(4), True),
    "4 bits with minima": (hire.Blocks(4, minimum=True), True),
    "8 bits, inputs in float32": (hire.Blocks(8), False),
    "4 bits, inputs in float32": (hire.Blocks(4), False),
    "bfloat16": (Float("bfloat16"), False),
}
"""Encodings, and whether inputs are rounded to 8 bits."""
PEERS = ("torch int8", "onnxruntime 4-bit")


def measure(
    n: int, d: int, rounds: int, bandwidth: float
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A row for each number of tokens and side, and why others are missing."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((n, d), np.float32) / np.float32(d**0.5)
    dense = jax.jit(lambda rows, x: x @ rows.T)
    sides: dict[str, Callable[[Array], Any]] = {
        DENSE: functools.partial(dense, jnp.asarray(weight))
    }
    sizes = {DENSE: weight.nbytes}
    for name, (encoding, rounded) in OWN.items():
        stored = jax.tree.map(lambda array: array[None], jax.jit(encoding.store)(weight))
        product = jax.jit(functools.partial(_product, encoding, rounded))
        sides[name], sizes[name] = functools.partial(product, stored), encoding.bytes(n, d)
    missing = {}
    for name in PEERS:
        peer = peers.build("head", name, weight)
        if isinstance(peer, str):
            missing[name] = peer
            continue
        sides[name] = functools.partial(_of_numpy, peer.logits)
        sizes[name] = peer.bytes(None)
    rows = []
    for tokens in TOKENS:
        x = jnp.asarray(rng.standard_normal((tokens, d)), jnp.float32)
        wanted = np.asarray(sides[DENSE](x))
        timings = timing.alternate(
            {name: functools.partial(side, x) for name, side in sides.items()}, rounds, cold=True
        )
        for name, side in sides.items():
            error = np.linalg.norm(np.asarray(side(x)) - wanted) / np.linalg.norm(wanted)
            row = timings.row(name, DENSE, sizes[name], bandwidth)
            about = {"n": n, "d": d, "tokens": tokens, "side": name, "ours": name in OWN}
            rows.append({**about, **row, "error": f"{error:.4f}"})
    return rows, missing


def _product(encoding: Encoding, rounded: bool, stored: Any, x: Array) -> Array:
    return encoding.product(x, stored, 0, round_inputs=rounded)


def _of_numpy(logits: Callable[[np.ndarray], Any], x: Array) -> Any:
    return logits(np.asarray(x))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    rounds = parser.parse_args().rounds
    bandwidth = timing.bandwidth()
    rows: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    for n, d in SIZES:
        found, missing = measure(n, d, rounds, bandwidth)
        rows += found
    print(table([list(rows[0]), *([str(value) for value in row.values()] for row in rows)]))
    if rounds == ROUNDS:
        result = {
            "rows": rows,
            "missing": missing,
            "read_gb_s": round(bandwidth / 1e9, 1),
            "kernels": kernels.cpu.status(),
            "libraries": peers.versions("torch", "onnxruntime"),
        }
        print(f"wrote {timing.write('products', result, 'python -m benchmarks.products')}")


if __name__ == "__main__":
    main()
