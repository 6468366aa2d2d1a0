"""Contexts under which a function is called."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import jax
from jax.experimental.xla_metadata import set_xla_metadata

from tests.fuzz.nesting import mesh


@contextlib.contextmanager
def _promotion_warns() -> Iterator[None]:
    with warnings.catch_warnings(), jax.numpy_rank_promotion("warn"):
        warnings.simplefilter("ignore")
        yield


CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "matmul precision": lambda: jax.default_matmul_precision("highest"),
    "matmul precision bfloat16": lambda: jax.default_matmul_precision("bfloat16"),
    "rank promotion raises": lambda: jax.numpy_rank_promotion("raise"),
    "rank promotion warns": _promotion_warns,
    "strict dtypes": lambda: jax.numpy_dtype_promotion("strict"),
    "x64": lambda: jax.enable_x64(True),
    "NaNs are errors": lambda: jax.debug_nans(True),
    "infinities are errors": lambda: jax.debug_infs(True),
    "leaks are errors": jax.checking_leaks,
    "no jit": jax.disable_jit,
    "transfers are errors": lambda: jax.transfer_guard("disallow"),
    "a default device": lambda: jax.default_device(jax.devices()[1]),
    "a mesh": lambda: jax.set_mesh(mesh()),
    "a named scope": lambda: jax.named_scope("around"),
    "metadata": lambda: set_xla_metadata(mark="around"),
    "another generator": lambda: jax.default_prng_impl("rbg"),
}
"""Each called anew, by name."""
