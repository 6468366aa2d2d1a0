"""Whether what a bound proves is so, and what tighter bounds would prove.

A block here is relu(x up + bias) down, and what it reads is told by the operation itself, called by
hand. Beside it stand NumPy's products in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import hire_rewrite as hire
from hire_rewrite.ops.certify import rounding
from hire_rewrite.ops.encodings import Float
from hire_rewrite.ops.ffn.positive import (
    PositiveFFNSpec,
    PositiveFFNState,
    positive_ffn,
    unsettled,
)
from hire_rewrite.ops.quantize import dequantize_blocks

BATCH = 500  # tokens at a time


class Block(NamedTuple):
    """up: [d, f], bias: [f], down: [f, d_out], of one dtype."""

    up: Any
    bias: Any
    down: Any

    def __call__(self, x: Array) -> Any:
        return jax.nn.relu(x @ self.up + self.bias) @ self.down


def by_hand(
    block: Block, predictor: hire.Quantized, margin: float | str
) -> tuple[PositiveFFNSpec, PositiveFFNState]:
    """The operation on a block that reads what may be positive, and its arrays, of one layer."""
    up, dtype = block.up.T, block.up.dtype
    width, d_out = block.down.shape
    rows = Float(str(dtype))
    spec = PositiveFFNSpec(
        up_dtype=dtype, down_dtype=dtype, precision=None, compute_dtype=dtype, width=width,
        d_out=d_out, projections=1, gates=(0,), budget=width, up=rows, down=rows,
        predictor=predictor, margin=margin,
    )  # fmt: skip
    guess = predictor.fit(up)
    stacked = {
        "gates": {},
        "up": {"rows": up},
        "down": {"rows": block.down},
        "vectors": (block.bias,),
        "predictor": guess,
        "bound": predictor.fit_bound(up, guess),
        "norms": rounding.norms(up)[None],
    }
    return spec, PositiveFFNState(**jax.tree.map(lambda array: array[None], stacked))


def _relu(pre: tuple[Array, ...], vectors: tuple[Array, ...]) -> Array:
    return jax.nn.relu(pre[0] + vectors[0])


@functools.partial(jax.jit, static_argnames="spec")
def read(x: Array, state: PositiveFFNState, spec: PositiveFFNSpec) -> Array:
    """bool[tokens, f], which neurons are read for x: [tokens, d]."""
    return unsettled(x, state, 0, spec=spec, activation=_relu)


@functools.partial(jax.jit, static_argnames="spec")
def rewritten(x: Array, state: PositiveFFNState, spec: PositiveFFNSpec) -> Array:
    """[tokens, d_out] of x: [tokens, d]."""
    return positive_ffn(x, state, 0, spec=spec, activation=_relu)


def share_read(block: Block, x: Array, predictor: hire.Quantized, margin: float | str) -> float:
    """The share of neurons that are read for x: [tokens, d]."""
    spec, state = by_hand(block, predictor, margin)
    return float(read(x, state, spec).mean())


def check(block: Block, tokens: np.ndarray, predictor: hire.Quantized) -> dict[str, Any]:
    """What is proved of the neurons for tokens: [n, d], beside products in float64.

    Returns:
      `tokens`; `positive` and `read`, shares of neurons; `skipped`, how many were left out, and
      `wrong`, how many of those are positive in float64; `greatest`, the greatest pre-activation
      among them; `off`, the greatest difference of a result from the dense block's; `orders`, that
      of the dense block from itself where both of its sums are in another order; and how far both
      are from float64: `error`, `error_dense`.
    """
    spec, state = by_hand(block, predictor, "proved")
    wide = Block(*(np.asarray(array, np.float64) for array in block))
    rng = np.random.default_rng(0)
    inner, outer = rng.permutation(spec.width), rng.permutation(tokens.shape[1])
    shuffled = Block(block.up[outer][:, inner], block.bias[inner], block.down[inner])
    dense = jax.jit(Block.__call__)
    total = {"positive": 0.0, "read": 0.0, "skipped": 0, "wrong": 0}
    most = dict.fromkeys(("off", "orders", "error", "error_dense"), 0.0) | {"greatest": -np.inf}
    for start in range(0, len(tokens), BATCH):
        x = jnp.asarray(tokens[start : start + BATCH], block.up.dtype)
        mask = np.asarray(read(x, state, spec))
        pre = np.asarray(x, np.float64) @ wide.up + wide.bias
        exact = np.maximum(pre, 0) @ wide.down
        total["positive"] += float((pre > 0).mean(1).sum())
        total["read"] += float(mask.mean(1).sum())
        total["skipped"] += int((~mask).sum())
        total["wrong"] += int((~mask & (pre > 0)).sum())
        ours, theirs, other = (
            np.asarray(y, np.float64)
            for y in (rewritten(x, state, spec), dense(block, x), dense(shuffled, x[:, outer]))
        )
        pairs = {
            "off": (ours, theirs),
            "orders": (other, theirs),
            "error": (ours, exact),
            "error_dense": (theirs, exact),
        }
        for name, (a, b) in pairs.items():
            most[name] = max(most[name], float(np.abs(a - b).max()))
        most["greatest"] = max(most["greatest"], float(pre[~mask].max(initial=-np.inf)))
    n = len(tokens)
    shares = {name: total[name] / n for name in ("positive", "read")}
    counts = {name: total[name] for name in ("skipped", "wrong")}
    return {"tokens": n, **shares, **counts, **most}


class Bound(NamedTuple):
    """A bound of |x · r − known|.

    Attributes:
      name: what it is.
      known: f[tokens, n] or 0, what is known of x · r.
      off: f[tokens, n].
      bytes: what it reads for each row besides the scores' own bytes.
    """

    name: str
    known: np.ndarray | float
    off: np.ndarray
    bytes: float


def bounds(x: np.ndarray, residual: np.ndarray) -> Iterator[Bound]:
    """Bounds for x: [tokens, d] and r: [n, d], all proved but the last. What arithmetic rounds is
    left out. Norms and exact residuals are float32 where they are read."""
    d, squares = x.shape[1], np.square(residual)
    yield Bound("Cauchy–Schwarz", 0.0, np.outer(norm(x), norm(residual)), 4)
    for size in (64, 16):
        parts = norm(x.reshape(len(x), -1, size)) @ norm(residual.reshape(-1, d // size, size)).T
        yield Bound(f"by blocks of {size} columns", 0.0, parts, 4 * d / size)
    for count in (4, 16, 64):
        kept = np.zeros_like(x)
        places = np.argsort(-np.abs(x), axis=1)[:, :count]
        np.put_along_axis(kept, places, np.take_along_axis(x, places, 1), 1)
        left = np.square(residual).sum(1) - (kept != 0).astype(float) @ squares.T
        off = norm(x - kept)[:, None] * np.sqrt(np.maximum(left, 0))
        name = f"the {count} greatest inputs exactly"
        yield Bound(name, kept @ residual.T, off, 4 + 4 * count)
    deviation = np.outer(norm(x), norm(residual)) / np.sqrt(d)
    yield Bound("3 standard deviations, not proved", 0.0, 3 * deviation, 4)


def tighter(
    data: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]], bits: tuple[int, ...] = (8, 4)
) -> list[dict[str, Any]]:
    """The share of neurons that each of `bounds` reads, and bytes as a share of the dense block's,
    in float32.

    Args:
      data: of each name tokens [n, d], up [d, f] and bias [f].
    """
    found = []
    for name, (x, up, bias) in data.items():
        x, rows = x.astype(np.float64), up.T.astype(np.float64)
        d = rows.shape[1]
        positive = float((x @ rows.T + bias > 0).mean())
        for count in bits:
            residual = rows - stored(rows, hire.Quantized(count))
            score = x @ (rows - residual).T + bias
            row = {"data": name, "d": d, "bits": count, "positive": positive}
            own = hire.Quantized(count).bytes(1, d, "float32")
            for bound in bounds(x, residual):
                share = float((score + bound.known + bound.off > 0).mean())
                size = own + bound.bytes + share * 8 * d
                more = {"bound": bound.name, "read": share, "bytes": size / (8 * d)}
                found.append(row | more)
    return found


def norm(vectors: np.ndarray) -> np.ndarray:
    return np.linalg.norm(vectors, axis=-1)


def stored(rows: np.ndarray, predictor: hire.Quantized) -> np.ndarray:
    """f64[n, d], rows as the predictor has them."""
    state = predictor.fit(jnp.asarray(rows, jnp.float32))
    if predictor.bits == 4:
        return np.asarray(dequantize_blocks(state["rows"], state["scale"]), np.float64)
    return np.asarray(state["rows"], np.float64) * np.asarray(state["scale"], np.float64)[:, None]
