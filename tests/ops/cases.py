"""Predictors and states that the tests of `ops` share."""

import dataclasses
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
        error = jax.random.normal(jax.random.key(n := rows.shape[0]), (n,))
        return {"rows": rows.astype(jnp.float32), "error": error}

    def score(self, state, x, layer):
        exact = jnp.matmul(x.astype(jnp.float32), state["rows"][layer].T)
        return exact + self.noise * state["error"][layer]

    def bytes(self, n, d, dtype):
        return n * d * jnp.dtype(dtype).itemsize


def stack(states: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def normal(seed: int, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


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
    return spec, HeadState(rows, stack([predictor.fit(layer) for layer in rows]))


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
        normal(seed + 10 * p, layers, width, d, dtype=dtype) / float(np.sqrt(d))
        for p in range(projections)
    )
    second = normal(seed + 1, layers, width, d, dtype=dtype) / float(np.sqrt(width))
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
    up = jnp.stack(first, 1).reshape(layers, projections, groups, group, d).swapaxes(1, 2)
    fits = [predictor.fit(jnp.concatenate([m[layer] for m in first])) for layer in range(layers)]
    extra = tuple(
        normal(seed + 100 + i, layers, groups, group, dtype=dtype) for i in range(vectors)
    )
    state = FFNState(up, second.reshape(layers, groups, group, d), extra, stack(fits))
    return spec, state, (*first, second)
