"""What rules, predictors and encodings ask of their settings alike."""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any

import jax
import numpy as np

from hire_rewrite.errors import HireRewriteError

__all__ = ["check_settings", "is_int", "is_iterable"]


def check_settings(given: Any) -> None:
    """Raise HireRewriteError if a field of a dataclass is an array: what is compared with one is an
    array again, and not true or false."""
    for field in dataclasses.fields(given):
        value = getattr(given, field.name)
        if isinstance(value, np.ndarray | jax.Array):
            raise HireRewriteError(
                f"{type(given).__name__}: {field.name} is an array of {value.dtype}"
                f"{list(value.shape)}: give a single Python number or word, which is the same for "
                "all layers and calls"
            )


def is_iterable(given: object) -> bool:
    """Whether something can be gone through: an array without axes says so, and cannot."""
    try:
        iter(given)  # type: ignore[call-overload]
    except TypeError:
        return False
    return True


def is_int(number: object) -> bool:
    """Whether a setting is a whole number (True and False are not)."""
    return isinstance(number, numbers.Integral) and not isinstance(number, bool)
