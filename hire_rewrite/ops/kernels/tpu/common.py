"""What the kernels share."""

from jax import Array
from jax.experimental.pallas import tpu as pltpu

LANES = 128
"""Columns in a tile. Rows of other lengths XLA may store column by column: then a kernel, which wants
them row by row, would make it copy the weight."""


def in_hbm(array: Array, interpret: bool) -> Array:
    """The array, kept where it is: XLA must not bring it into VMEM before the kernel starts."""
    return array if interpret else pltpu.with_memory_space_constraint(array, pltpu.HBM)
