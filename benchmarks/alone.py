"""A head and a gated block as functions of their own, to be measured alone."""

import jax
from jax import Array


def head(w: Array, x: Array) -> Array:
    return x @ w.T


def block(w: dict[str, Array], x: Array) -> Array:
    return (jax.nn.silu(x @ w["gate"].T) * (x @ w["up"].T)) @ w["down"]
