"""How many bytes of its operands an equation reads."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jax.extend import core as jex_core

from hire_rewrite.passes.diff.code import Line

_VIEWS = frozenset({
    "reshape", "squeeze", "broadcast_in_dim", "expand_dims", "iota", "copy", "stop_gradient",
    "bitcast_convert_type", "return", "transpose",
})  # fmt: skip
"""What the compiler does without reading, or while somebody else reads."""
_PICKS = frozenset({"gather", "dynamic_slice", "slice"})
"""What reads as much as it returns."""
_UPDATES = frozenset({"dynamic_update_slice", "scatter", "scatter-add", "scatter_add"})
"""What reads its update, if the array is updated in place."""


def bytes_read(line: Line) -> int:
    """Bytes of its operands that one run reads; of a loop or branch, what the equations inside do.

    What fits a cache counts like the rest.
    """
    if line.primitive in _VIEWS:
        return 0
    if line.primitive in _PICKS:
        return sum(map(_size, line.outs))
    if line.primitive in _UPDATES:
        return sum(map(_size, line.ins[1:]))
    if line.inner and not line.is_site:
        return sum(
            (inner.length or 1) * sum(map(bytes_read, inner.code.lines)) for inner in line.inner
        )
    return sum(
        map(_size, dict.fromkeys(v for v in line.ins if not isinstance(v, jex_core.Literal)))
    )


def size_of(aval: Any) -> int:
    """Bytes of an array of a type; 0 if that is not known."""
    try:
        return math.prod(aval.shape) * np.dtype(aval.dtype).itemsize
    except (AttributeError, TypeError):
        return 0


def _size(var: Any) -> int:
    return size_of(var.aval)
