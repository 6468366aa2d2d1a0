"""Kernels: operations that XLA's own code computes badly, written for a platform.

`cpu` has those in C++, `tpu` those in Pallas; `register_kernel` adds others.
"""

from hire_rewrite.ops.kernels.operation import Operation, Registration, register_kernel

__all__ = ["Operation", "Registration", "register_kernel"]
