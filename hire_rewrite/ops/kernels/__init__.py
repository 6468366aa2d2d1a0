"""Kernels: operations that XLA's own code computes badly, written for a platform.

`cpu` has those in C++, `tpu` those in Pallas; `register_kernel` adds others. The operations are
`matmul` and `block_matmul` in `hire_rewrite.ops.narrow` (rows of few bits), `block_product` in
`hire_rewrite.ops.encodings.product` (rows in blocks), `gathered_matmul` and `gathered_sum` in
`hire_rewrite.ops.gather`, `top_k_operation` in `hire_rewrite.ops.top_k.select`.
"""

from hire_rewrite.ops.kernels.operation import KernelOperation, Registration, register_kernel

__all__ = ["KernelOperation", "Registration", "register_kernel"]
