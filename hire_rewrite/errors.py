"""What a caller can catch: one family of errors, and one of warnings."""

from __future__ import annotations

import os
import sys
import warnings
from types import FrameType

import jax


class HireRewriteError(ValueError):
    """Bad input: the message names the site or argument, the reason, and what to change."""


EXTRA = "pip install '.[{}]' in a checkout"
"""How an extra is installed, while the package is not on PyPI: `EXTRA.format("plot")`."""


class HireRewriteWarning(UserWarning):
    """Something runs, and not as it was meant: slower, less exact, or not rewritten."""


_INSIDE = tuple(os.path.dirname(file) + os.sep for file in (__file__, str(jax.__file__)))


def warn(message: str) -> None:
    """Warn at the line that called this package, past frames of its own and of JAX."""
    level = 1
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, HireRewriteWarning, stacklevel=level if frame else 2)
