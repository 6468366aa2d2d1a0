"""Kernels: operations that XLA's own code computes badly, written for a platform.

`call` runs one in place of a reference in JAX, where there is one. `cpu` has those in C++, `tpu`
those in Pallas. With `HIRE_REWRITE_KERNELS=0` in the environment none are used.
"""

from hire_rewrite.ops.kernels import cpu, tpu
from hire_rewrite.ops.kernels.call import call

__all__ = ["call", "cpu", "tpu"]
