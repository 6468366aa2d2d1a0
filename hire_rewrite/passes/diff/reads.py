"""How many bytes of its operands an equation reads."""

from __future__ import annotations

import math
from collections.abc import Set
from typing import Any

import numpy as np
from jax.export import is_symbolic_dim
from jax.extend import core as jex_core

from hire_rewrite.passes.diff.code import Inner, Line

_VIEWS = frozenset({
    "reshape", "squeeze", "broadcast_in_dim", "expand_dims", "iota", "copy", "stop_gradient",
    "bitcast_convert_type", "return", "transpose",
})  # fmt: skip
"""What the compiler does without reading, or while somebody else reads."""
_PICKS = frozenset({"gather", "dynamic_slice", "slice"})
"""What reads as much as it returns."""
_UPDATES = frozenset({"dynamic_update_slice", "scatter", "scatter-add", "scatter_add"})
"""What reads its update, if the array is updated in place."""

_LITERAL = jex_core.Literal


def bytes_read(line: Line, stacks: Set[Any] = frozenset()) -> int:
    """Bytes of its operands that one run reads; of a loop or branch, what the equations inside do.

    What fits a cache counts like the rest.

    Args:
      stacks: operands with an axis of layers in front, of which a run reads one.
    """
    if line.primitive in _VIEWS:
        return 0
    if line.primitive in _PICKS:
        return sum(map(_size, line.outs))
    if line.primitive in _UPDATES:
        return sum(map(_size, line.ins[1:]))
    if line.inner and not line.is_site:
        size = 0
        for inner in line.inner:
            inside = stacks_inside(line, inner, stacks)
            each = sum(bytes_read(other, inside) for other in inner.code.lines)
            size += (inner.length or 1) * each
        return size
    read = dict.fromkeys(v for v in line.ins if not isinstance(v, _LITERAL))
    return sum(_size(v) // (v.aval.shape[0] if v in stacks else 1) for v in read)


def stacks_inside(line: Line, inner: Inner, stacks: Set[Any]) -> frozenset[Any]:
    """The inputs of a jaxpr inside an equation that are such stacks, whole."""
    pairs = zip(inner.code.inputs, inner.roles, strict=True)
    given = ((var, line.ins[i]) for var, (role, i) in pairs if i is not None and role != "slice")
    return frozenset(v for v, atom in given if not isinstance(atom, _LITERAL) and atom in stacks)


def size_of(aval: Any) -> int:
    """Bytes of an array of a type; 0 if that is not known. Symbolic sizes are taken for one."""
    try:
        sizes = (size for size in aval.shape if not is_symbolic_dim(size))
        return math.prod(sizes) * np.dtype(aval.dtype).itemsize
    except (AttributeError, TypeError):
        return 0


def _size(var: Any) -> int:
    return size_of(var.aval)
