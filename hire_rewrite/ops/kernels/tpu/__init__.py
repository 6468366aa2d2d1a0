"""Kernels for TPU in Pallas: rows are read from HBM, and nothing else is.

XLA widens narrow rows and gathers a few without a copy in HBM, as a rule. But it may bring a whole
weight into VMEM to gather from there, which saves nothing; these kernels never do.
"""

from hire_rewrite.ops.kernels.tpu.rows import (
    fetched_product,
    fetched_sum,
    fits_groups,
    fits_single,
)
from hire_rewrite.ops.kernels.tpu.scores import (
    block_product,
    fits_blocks,
    fits_product,
    product,
)

__all__ = [
    "block_product",
    "fetched_product",
    "fetched_sum",
    "fits_blocks",
    "fits_groups",
    "fits_product",
    "fits_single",
    "product",
]
