"""What several test files share: small arrays, rules, and comparisons.

Each `Case` (see `cases_ffn`, `cases_head`) is a function of (params, *args) and what must be found
in it. The same cases are detected (tests/patterns) and rewritten (tests/passes).
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import hire_rewrite as hire
from hire_rewrite.graph.trace import Trace, trace
from hire_rewrite.passes.detect import detect
from hire_rewrite.sites import MatchedSite

D, F, V, T = 16, 64, 128, 3
MIN_WIDTH = 100


@dataclasses.dataclass(frozen=True)
class Oracle:
    """A predictor that computes what it should guess, so that few candidates suffice.

    It errs by `noise` times a fixed random number for each row.
    """

    noise: float = 0.0

    wants_calibration = False

    def check(self, n: int, d: int, *, site: str = "", tokens: int | None = None) -> None:
        pass

    def fit(self, rows: Any, moments: Any = None, top: int | None = None) -> Any:
        error = np.random.default_rng(7).standard_normal(rows.shape[0])
        return {"rows": rows.astype(jnp.float32), "error": jnp.asarray(error, jnp.float32)}

    def score(self, state: Any, x: Any, layer: Any, choose: Any = None) -> Any:
        exact = jnp.matmul(x.astype(jnp.float32), state["rows"][layer].T)
        return exact + self.noise * state["error"][layer][None]

    def bytes(self, n: int, d: int, dtype: Any, tokens: int = 1) -> int:
        return 0


FULL = (
    hire.FFN(k=1.0, candidates=1.0, predictor=Oracle(), max_tokens=None, force=True),
    hire.Head(k=1.0, candidates=1.0, predictor=Oracle(), min_width=MIN_WIDTH, force=True),
)
FEW = (
    hire.FFN(k=8, candidates=8, group=4, predictor=Oracle(), max_tokens=None, force=True),
    hire.Head(k=8, candidates=16, predictor=Oracle(), min_width=MIN_WIDTH, force=True),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A function, its arguments, and the fields that its only site must have."""

    name: str
    fn: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    expected: dict[str, Any]

    def __str__(self) -> str:
        return self.name


def rand(*shape: int, seed: int = 0, dtype: Any = jnp.float32) -> jax.Array:
    """Normal numbers; a product with a matrix of them keeps the scale of its input.

    (`jnp.asarray` would compile a program for each shape.)
    """
    size = shape[-2] if len(shape) > 1 else 1
    rng = np.random.default_rng([seed, *shape])
    return jax.device_put(np.asarray(rng.normal(size=shape) / np.sqrt(size), dtype))


def inputs(*shape: int, seed: int = 7, dtype: Any = jnp.float32) -> jax.Array:
    numbers = np.random.default_rng([seed, *shape]).normal(size=shape)
    return jax.device_put(np.asarray(numbers, dtype))


def plan_of(fn: Any, *args: Any, rules: Any = FULL, weights: Any = 0, **kwargs: Any) -> hire.Plan:
    return hire.inspect(fn, *args, rules=rules, weights=weights, **kwargs)


def found_in(
    fn: Any, *args: Any, weights: Any = (0,), min_width: int = MIN_WIDTH
) -> tuple[Trace, tuple[MatchedSite, ...]]:
    traced = trace(fn, args, {}, weights)
    return traced, detect(traced, [hire.Head(min_width=min_width)]).sites


def packed(step: Any, *args: Any, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return step.pack(*args, **kwargs)


def run(fn: Any, *args: Any) -> Any:
    """`fn` under `jit`, compiled as quickly as XLA can (see `conftest`)."""
    return jax.jit(fn)(*args)


def optimized(fn: Any, **settings: Any) -> Any:
    """`fn` under a `jit` that compiles as a user's does, for what runs long or is XLA's own."""
    options: dict[str, Any] = {"xla_backend_optimization_level": 3}
    if "xla_cpu_use_fusion_emitters" in os.environ["XLA_FLAGS"]:
        options["xla_cpu_use_fusion_emitters"] = True
    return jax.jit(fn, compiler_options=options, **settings)


def close(got: Any, want: Any, tolerance: float = 1e-4) -> None:
    """Equal structures, and arrays equal to `tolerance` of the greatest entry."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = jnp.asarray(a), jnp.asarray(b)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if jnp.issubdtype(b.dtype, jnp.inexact):
            b = np.asarray(b, np.float32)
            finite = np.abs(b[np.isfinite(b)])
            limit = tolerance * max(1.0, finite.max(initial=0.0))
            np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=0, atol=limit)
        else:
            np.testing.assert_array_equal(a, b)
