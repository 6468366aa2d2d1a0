"""What runs in place of the rewritten code: ordinary functions of arrays, usable by hand."""

from hire_rewrite.ops.kernels import cpu, tpu  # registers them

__all__ = ["cpu", "tpu"]
