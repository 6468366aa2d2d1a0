"""Between the layout of a traced value and the token layout [tokens, n] that operations work on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from hire_rewrite.patterns.window import Window


def to_tokens(array: Any, axes: Sequence[int]) -> Any:
    """[tokens, n] with `axes` merged to the last one and all others to the first."""
    size = math.prod(array.shape[axis] for axis in axes)
    others = [n for axis, n in enumerate(array.shape) if axis not in axes]
    return jnp.moveaxis(array, axes, range(-len(axes), 0)).reshape(math.prod(others), size)


def from_tokens(rows: Any, shape: Sequence[int], axes: Sequence[int]) -> Any:
    """[tokens, n] laid out as `shape`, n on `axes` of it."""
    others = [size for i, size in enumerate(shape) if i not in axes]
    split = rows.reshape(*others, *(shape[axis] for axis in axes))
    return jnp.moveaxis(split, range(-len(axes), 0), axes)


def cut_out(array: Any, window: Window, leading: int = 0) -> Any:
    """The positions of a window, of an array that has some leading axes more than the window."""
    for axis in (window.axis, *window.picked):
        assert axis is not None
        start, stop, stride = window.cut(axis)
        array = lax.slice_in_dim(array, start, stop, stride, axis=axis + leading)
    return array
