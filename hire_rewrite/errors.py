"""What a caller can catch: one family of errors, and one of warnings."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Hashable, Iterable
from types import FrameType
from typing import TypeVar

import jax

Key = TypeVar("Key", bound=Hashable)


class HireRewriteError(ValueError):
    """Bad input: the message names the site or argument, the reason, and what to change."""


EXTRA = "pip install '.[{}]' in a checkout"
"""How an extra is installed, while the package is not on PyPI: `EXTRA.format("plot")`."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of the host or of a device, does not suffice."""
    exhausted = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    return exhausted or isinstance(error, MemoryError)


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


class Warner:
    """Warns of each thing about a function once.

    Args:
      name: of the function, with which messages begin.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._said: set[Hashable] = set()

    def __call__(self, message: str, key: Hashable = None) -> None:
        """Warn, unless that was done of what has this key, by default the message."""
        if self.new([key or message]):
            warn(f"{self._name}: {message}")

    def new(self, keys: Iterable[Key]) -> list[Key]:
        """Those that nothing was said of yet, and now is."""
        found = [key for key in keys if key not in self._said]
        self._said.update(found)
        return found
