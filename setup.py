"""Builds the kernels for CPU, where there is a compiler; everything else is in pyproject.toml."""

from pathlib import Path

import jaxlib
from setuptools import Extension, setup

KERNELS = Path("hire_rewrite/ops/kernels/cpu")

library = Extension(
    "hire_rewrite.ops.kernels.cpu._library",
    sources=[str(path) for path in sorted(KERNELS.glob("*.cc"))],
    depends=[str(path) for path in sorted((*KERNELS.glob("*.h"), *KERNELS.glob("*.inc")))],
    include_dirs=[str(Path(jaxlib.__file__).parent / "include")],
    extra_compile_args=["-std=c++17", "-O3", "-fvisibility=hidden", "-Wno-psabi"],
    language="c++",
    optional=True,  # without it the package runs in JAX alone
)
setup(ext_modules=[library])
