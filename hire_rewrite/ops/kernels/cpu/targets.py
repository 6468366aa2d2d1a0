"""The functions of the C++ library, which XLA calls through its foreign function interface."""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import os
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import Array

__all__ = [
    "block_product",
    "fetched_product",
    "fetched_sum",
    "product",
    "status",
    "top_k",
]

_VERSION = 2
"""Of the targets' operands; see `targets.cc`."""

_TARGETS = (
    "hire_block_product",
    "hire_fetched_product",
    "hire_fetched_sum",
    "hire_product",
    "hire_top_k",
)


@functools.cache
def status() -> str:
    """`"in use"`, or why they are not."""
    if os.environ.get("HIRE_REWRITE_KERNELS") == "0":
        return "not in use: HIRE_REWRITE_KERNELS=0"
    folder = Path(__file__).parent
    built = [folder / f"_library{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    built = [path for path in built if path.exists()]
    if not built:
        return "not built: install again where a C++ compiler is found"
    try:
        library = ctypes.CDLL(str(built[0]))
        if not hasattr(library, "hire_version") or library.hire_version() != _VERSION:
            return "not in use: built from other sources; install again"
        for name in _TARGETS:
            target = jax.ffi.pycapsule(getattr(library, name))
            jax.ffi.register_ffi_target(name, target, platform="cpu")
    except Exception as error:  # a kernel is never worth a failed import
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return f"not in use: built for another jaxlib ({reason}); install again"
    return "in use"


def product(
    x: Array,
    rows: Array,
    layer: Array,
    scale: Array | None = None,
    offset: Array | None = None,
) -> Array:
    """f32[tokens, n] = x @ rows[layer].T * scale[layer] + offset[layer].

    Args:
      x: f32[tokens, d].
      rows: [L, n, d].
      layer: i32[].
      scale, offset: f32[L, n], or None for none.
    """
    none = jnp.zeros((rows.shape[0], 0), jnp.float32)
    factors = (none if factor is None else factor for factor in (scale, offset))
    shape = (x.shape[0], rows.shape[1])
    return _call("hire_product", shape)(x, rows, layer.reshape(1), *factors)


def block_product(x: Array, x_scale: Array, packed: Array, scale: Array, layer: Array) -> Array:
    """f32[tokens, n] for tokens and rows as `round_blocks` and `quantize_blocks` store them.

    Args:
      x: i8[tokens, d].
      x_scale: f32[tokens, d/block].
      packed: i8[L, n, d/2].
      scale: bf16[L, n, d/block]; in whole blocks of 32 for each half.
      layer: i32[].
    """
    shape = (x.shape[0], packed.shape[1])
    return _call("hire_block_product", shape)(x, x_scale, packed, scale, layer.reshape(1))


def fetched_product(x: Array, rows: Array, index: Array) -> Array:
    """f32[tokens, n · m], products with rows that are read where they are.

    Args:
      x: f32[tokens, d].
      rows: [N, m, d].
      index: i32[1, n], for all tokens, or i32[tokens, n].
    """
    shape = (x.shape[0], index.shape[1] * rows.shape[1])
    return _call("hire_fetched_product", shape)(x, rows, index)


def fetched_sum(h: Array, rows: Array, index: Array) -> Array:
    """f32[tokens, d], the sum of rows[index] with the weights h.

    Args:
      h: f32[tokens, n, m].
      rows: [N, m, d], float32 or bfloat16.
      index: i32[n].
    """
    return _call("hire_fetched_sum", (h.shape[0], rows.shape[2]))(h, rows, index)


def top_k(scores: Array, k: int) -> tuple[Array, Array]:
    """`lax.top_k` of f32[..., n]."""
    shape = (*scores.shape[:-1], k)
    results = (jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape, jnp.int32))
    values, indices = jax.ffi.ffi_call("hire_top_k", results, vmap_method="expand_dims")(scores)
    return values, indices


def _call(target: str, shape: tuple[int, ...]) -> Callable[..., Array]:
    result = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.ffi.ffi_call(target, result, vmap_method="sequential")
