"""Predictors and states that the tests of `ops` share."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hire_rewrite.ops.ffn import FFNSpec, FFNState
from hire_rewrite.ops.head import HeadSpec, HeadState


@dataclasses.dataclass(frozen=True)
class Oracle:
    """Scores without error, plus `noise` times a fixed random number for each row."""

    noise: float = 0.0

    wants_calibration = False

    def check(self, n, d, *, site=""):
        pass

    def fit(self, rows, moments=None):
        return {"rows": rows.astype(jnp.float32), "error": normal(7, rows.shape[0])}

    def score(self, state, x, layer):
        exact = jnp.matmul(x.astype(jnp.float32), state["rows"][layer].T)
        return exact + self.noise * state["error"][layer]

    def bytes(self, n, d, dtype):
        return n * d * jnp.dtype(dtype).itemsize


def stack(states: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *states)


def normal(seed: int, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
    """Normal numbers. They come from numpy, which compiles nothing for a new shape."""
    return scaled(1.0, seed, *shape, dtype=dtype)


def scaled(factor: float, seed: int, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(factor * np.random.default_rng(seed).standard_normal(shape), dtype)


def fitted(predictor: Any, rows: Any) -> Any:
    """The predictor's state for rows: [L, n, d]."""
    return stack([_fit(predictor)(layer) for layer in np.asarray(rows)])


@functools.cache
def _fit(predictor: Any) -> Any:
    """Compiled once for equal predictors, not once for each test."""
    return jax.jit(predictor.fit)


def head(
    predictor: Any,
    *,
    layers: int = 1,
    width: int = 200,
    d: int = 16,
    k: int = 4,
    candidates: int = 20,
    tail: str = "predicted",
    dtype: Any = jnp.float32,
    seed: int = 0,
) -> tuple[HeadSpec, HeadState]:
    rows = normal(seed, layers, width, d, dtype=dtype)
    spec = HeadSpec(width, k, candidates, tail, jnp.dtype(dtype), None, jnp.dtype(dtype))
    return spec, HeadState(rows, fitted(predictor, rows))


def ffn(
    predictor: Any,
    *,
    layers: int = 1,
    width: int = 96,
    d: int = 16,
    group: int = 4,
    projections: int = 2,
    k_groups: int = 3,
    candidate_groups: int = 6,
    gate: int | None = 0,
    gate_bias: int | None = None,
    vectors: int = 0,
    dtype: Any = jnp.float32,
    seed: int = 0,
) -> tuple[FFNSpec, FFNState, tuple[jax.Array, ...]]:
    """A block, and its weights as a model has them: P first matrices [L, f, d], the second."""
    groups = width // group
    first = tuple(
        scaled(d**-0.5, seed + 10 * p, layers, width, d, dtype=dtype) for p in range(projections)
    )
    second = scaled(width**-0.5, seed + 1, layers, width, d, dtype=dtype)
    spec = FFNSpec(
        width=width,
        group=group,
        projections=projections,
        k_groups=k_groups,
        candidate_groups=candidate_groups,
        gate=gate,
        gate_bias=gate_bias,
        up_dtype=jnp.dtype(dtype),
        down_dtype=jnp.dtype(dtype),
        precision=None,
        compute_dtype=jnp.dtype(dtype),
    )
    stacked = np.stack(first, 1)
    up = jnp.asarray(stacked.reshape(layers, projections, groups, group, d).swapaxes(1, 2))
    extra = tuple(
        normal(seed + 100 + i, layers, groups, group, dtype=dtype) for i in range(vectors)
    )
    scored = fitted(predictor, stacked.reshape(layers, projections * width, d))
    state = FFNState(up, second.reshape(layers, groups, group, d), extra, scored)
    return spec, state, (*first, second)
