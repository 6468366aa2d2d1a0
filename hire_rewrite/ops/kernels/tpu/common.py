"""What the kernels share."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import tpu as pltpu

from hire_rewrite.ops.kernels.tpu.fits import LANES

BLOCK = 1 << 20
"""Bytes of rows that are in VMEM at a time, twice over: while one block is used, the next comes."""


def in_hbm(array: Array, interpret: bool) -> Array:
    """The weight, kept where it is: XLA must not bring it into VMEM before the kernel starts.

    Raises:
      NotImplementedError: under a `vmap` over weights, of which each would be copied.
    """
    array = _one(array)
    return array if interpret else pltpu.with_memory_space_constraint(array, pltpu.HBM)


@jax.custom_batching.custom_vmap
def _one(array: Array) -> Array:
    return array


@_one.def_vmap
def _(*_: Any) -> tuple[Array, bool]:
    raise NotImplementedError("the kernels for TPU take no batch of weights")


def result(shape: tuple[int, ...], x: Array) -> jax.ShapeDtypeStruct:
    """A kernel's result in float32, which inside `shard_map` differs where its operand x does."""
    kind = jax.typeof(x).manual_axis_type
    return jax.ShapeDtypeStruct(shape, jnp.float32, manual_axis_type=kind)


def step_of(n: int, width: int) -> int:
    """Rows of `width` bytes in a block: whole vectors of results, or all of the rows."""
    step = max(1, BLOCK // (width * LANES)) * LANES
    return n if n <= step else step


def times(x: Array, rows: Array) -> Array:
    """f32[m, n] = x @ rows.T."""
    dims = (((1,), (1,)), ((), ()))
    return lax.dot_general(
        x, rows, dims, precision=lax.Precision.DEFAULT, preferred_element_type=jnp.float32
    )
