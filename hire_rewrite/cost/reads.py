"""Reads of matrices, as a machine's times know them (see `cost.machine`)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from hire_rewrite.ops.predictors import Read


def whole(numbers: int, dtype: Any, tokens: int) -> Read:
    """A matrix of so many numbers that the compiler multiplies with."""
    return Read(f"dense_{_precision(dtype)}", numbers * dtype.itemsize, tokens)


def gathered(pieces: int, numbers: int, dtype: Any, tokens: int) -> Read:
    """Rows of so many numbers, gathered in so many pieces."""
    return Read(f"fetched_{_precision(dtype)}", numbers * dtype.itemsize, tokens, pieces=pieces)


def _precision(dtype: Any) -> str:
    half = dtype.itemsize == 2 and jnp.issubdtype(dtype, jnp.floating)
    return "bfloat16" if half else "float32"
