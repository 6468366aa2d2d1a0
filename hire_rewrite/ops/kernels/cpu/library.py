"""The library of kernels for CPU, and how its targets are called."""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from hire_rewrite.errors import warn

__all__ = ["announce", "call", "calls", "one", "status", "usable"]

_VERSION = 8
"""Of the targets' operands; see `targets.cc`."""

_TARGETS = (
    "block_product",
    "fetched_product",
    "fetched_sum",
    "listed",
    "listed_product",
    "listed_sum",
    "picked_product",
    "picked_sum",
    "product",
    "set_apart",
    "top_k",
)
_KNOWN = frozenset(map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.int8)))


@functools.cache
def status() -> str:
    """`"in use"`, or why they are not."""
    if os.environ.get("HIRE_REWRITE_KERNELS") == "0":
        return "not in use: HIRE_REWRITE_KERNELS=0"
    folder = Path(__file__).parent
    paths = (folder / f"_library{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    built = [path for path in paths if path.exists()]
    if not built:
        return "not built: install again where a C++ compiler is found"
    try:
        library = ctypes.CDLL(str(built[0]))
        if not hasattr(library, "hire_version") or library.hire_version() != _VERSION:
            return "not in use: built from other sources; install again"
        for name in _TARGETS:
            target = jax.ffi.pycapsule(getattr(library, f"hire_{name}"))
            jax.ffi.register_ffi_target(f"hire_{name}", target, platform="cpu")
    except Exception as error:  # a kernel is never worth a failed import
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return f"not in use: built for another jaxlib ({reason}); install again"
    return "in use"


@functools.cache
def announce() -> None:
    """Warn, once in a process, that the kernels are not in use, unless that was asked for."""
    if status() != "in use" and os.environ.get("HIRE_REWRITE_KERNELS") != "0":
        warn(f"the kernels for CPU are {status()}. What is rewritten runs in JAX alone, slower")


def usable(x: Array, *dtypes: Any) -> bool:
    """Whether the library is there, x is not empty, and all dtypes are known to it."""
    known = all(dtype is None or jnp.dtype(dtype) in _KNOWN for dtype in dtypes)
    return known and isinstance(x.size, int) and x.size > 0 and status() == "in use"


def call(name: str, shape: tuple[int, ...], *operands: Array, **attributes: Any) -> Array:
    """f32[shape]. Floating-point vectors are f32, what chooses is i32."""
    (result,) = calls(name, [shape], *operands, **attributes)
    return result


def calls(
    name: str, shapes: Sequence[tuple[int, ...]], *operands: Array, **attributes: Any
) -> Sequence[Array]:
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    target = jax.ffi.ffi_call(f"hire_{name}", results, vmap_method="sequential")
    return target(*operands, **attributes)


def one(layer: Array | int) -> Array:
    return jnp.asarray(layer, jnp.int32).reshape(1)
