"""The axis rules of operations that move, cut, merge or choose positions."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from jax import lax
from jax.extend.core import primitives as p

from hire_rewrite import _compat
from hire_rewrite.graph.nodes import Node
from hire_rewrite.graph.traits import Trait
from hire_rewrite.patterns.axes import Blocked, Window, Windows, origin, register_axis_rule
from hire_rewrite.patterns.linear import free_axes, is_one_hot

Operands = Sequence[Any]
Shape = Sequence[int]


def _reshaped(operands: Operands, target: Shape, /, **_: Any) -> Any:
    """Of what cuts, too: its operand was cut where the positions were chosen."""
    return lax.reshape(operands[0], target)


@register_axis_rule(p.bitcast_convert_type_p)
def _bitcast(node: Node, window: Window, **_: Any) -> Windows:
    if node.ins[0].shape != node.outs[0].shape:
        raise Blocked("is bitcast to numbers of another width")
    return (window,)


def _bind_broadcast(
    operands: Operands, target: Shape, /, *, broadcast_dimensions: Shape, **_: Any
) -> Any:
    return lax.broadcast_in_dim(operands[0], target, broadcast_dimensions)


@register_axis_rule(p.broadcast_in_dim_p, bind=_bind_broadcast)
def _broadcast_in_dim(
    node: Node, window: Window, *, broadcast_dimensions: Shape, **_: Any
) -> Windows:
    old, new = node.ins[0].shape, node.outs[0].shape
    # The operand's axes, by those of the result along which they vary.
    sources = {
        axis: here for here, axis in enumerate(broadcast_dimensions) if old[here] == new[axis]
    }
    picks = [(sources[axis], position) for axis, position in window.picks if axis in sources]
    axis = None if window.axis is None else sources.get(window.axis)
    return (window.with_axis(axis).with_picks(picks),)


@register_axis_rule(p.transpose_p)
def _transpose(node: Node, window: Window, *, permutation: Shape, **_: Any) -> Windows:
    return (_renumbered(window, permutation),)


@register_axis_rule(p.squeeze_p)
def _squeeze(node: Node, window: Window, *, dimensions: Shape, **_: Any) -> Windows:
    return (_renumbered(window, _without(node, dimensions)),)


@register_axis_rule(p.dot_general_p)
def _choice(node: Node, window: Window, **_: Any) -> Windows:
    """A product with one-hot rows, along an axis that only the other operand has."""
    chosen = next((i for i in (0, 1) if is_one_hot(node.ins[1 - i])), None)
    if chosen is None:
        raise Blocked("comes from a product that is not linear in a weight along it")
    sources = {out: axis for axis, out in free_axes(node, chosen).items()}
    if window.axis not in sources or window.picks:
        raise Blocked("is chosen from")
    inner = window.with_axis(sources[window.axis])
    return (inner, Window(None)) if chosen == 0 else (Window(None), inner)


@register_axis_rule(p.reshape_p, bind=_reshaped)
def _reshape(node: Node, window: Window, **_: Any) -> Windows:
    """Axes may be merged and split where the window then lies in one axis, the others picked."""
    old, new = node.ins[0].shape, node.outs[0].shape
    picks: list[tuple[int, int]] = []
    inner: Window | None = None
    for olds, news in _blocks(old, new):
        here = [i for i in news if i in window.axes]
        if not here:
            continue
        # The window as places in the block, counted in row-major order.
        place, step = 0, 0
        for i in here:
            below = math.prod(new[j] for j in news if j > i)
            place += below * window.picked.get(i, window.start)
            step = window.stride * below if i == window.axis else step
        whole = all(i in here for i in news if new[i] != 1)
        if window.axis in news:
            inner = _line(old, olds, place, step, window.size) if whole else None
        if not whole or (window.axis in news and inner is None):
            raise Blocked(f"is split or merged by a reshape from {old} to {new}")
        picks += _picks(old, olds, place)
    assert inner is not None
    return (inner.with_picks([pick for pick in picks if pick[0] != inner.axis]),)


@register_axis_rule(p.slice_p, bind=_reshaped)
def _slice(
    node: Node, window: Window, *, start_indices: Shape, strides: Shape | None, **_: Any
) -> Windows:
    return (_sliced(window, node.ins[0].shape, node.outs[0].shape, start_indices, strides),)


@register_axis_rule(p.dynamic_slice_p, bind=_reshaped)
def _dynamic_slice(node: Node, window: Window, **_: Any) -> Windows:
    """A slice at places that are written into the program."""
    old, new, starts = node.ins[0].shape, node.outs[0].shape, []
    for place, size, kept in zip(node.ins[1:], old, new, strict=True):
        if size == kept:
            starts.append(0)
        elif place.literal is None:
            raise Blocked("is sliced at a place that is computed")
        else:
            starts.append(min(max(int(np.asarray(place.literal)), 0), size - kept))
    return (_sliced(window, old, new, starts), *(Window(None) for _ in starts))


@register_axis_rule(_compat.split_p, bind=_reshaped)
def _split(
    node: Node, window: Window, *, output: int, axis: int, sizes: Shape, **_: Any
) -> Windows:
    old, new = node.ins[0].shape, node.outs[output].shape
    starts = [sum(sizes[:output]) if i == axis else 0 for i in range(len(old))]
    return (_sliced(window, old, new, starts),)


@register_axis_rule(_compat.unstack_p, bind=_reshaped)
def _unstack(node: Node, window: Window, *, output: int, axis: int, **_: Any) -> Windows:
    inner = _renumbered(window, _without(node, [axis]))
    return (inner.with_picks([*inner.picks, (axis, output)]),)


def _bind_pad(operands: Operands, target: Shape, /, *, padding_config: Any, **_: Any) -> Any:
    array, value = operands
    return array if array.shape == tuple(target) else lax.pad(array, value, padding_config)


@register_axis_rule(p.pad_p, bind=_bind_pad)
def _pad(node: Node, window: Window, *, padding_config: Any, **_: Any) -> Windows:
    """Padding of other axes."""
    if any(tuple(padding_config[i]) != (0, 0, 0) for i in (window.axis, *window.picked)):
        raise Blocked("is padded")
    return (window, Window(None))


def _bind_gather(
    operands: Operands, target: Shape, /, *, output: int, dimension_numbers: Any, **params: Any
) -> Any:
    array, gone = operands[0], _collapsed(dimension_numbers)
    if all(array.shape[i] == 1 for i in gone) and math.prod(array.shape) == math.prod(target):
        return _reshaped(operands, target)
    offsets = iter(dimension_numbers.offset_dims)
    sizes = [1 if axis in gone else target[next(offsets)] for axis in range(array.ndim)]
    params |= {"dimension_numbers": dimension_numbers, "slice_sizes": tuple(sizes)}
    return lax.gather(*_compat.varying_alike(operands), **params)


@register_axis_rule(p.gather_p, bind=_bind_gather)
def _gather(
    node: Node, window: Window, *, dimension_numbers: Any, slice_sizes: Shape, **_: Any
) -> Windows:
    """A slice, or whole rows that another axis chooses (a bias for each expert, say)."""
    old, kept = node.ins[0].shape, _without(node, _collapsed(dimension_numbers))
    starts = fixed_starts(node)
    if starts is not None:
        return (_sliced(_renumbered(window, kept), old, slice_sizes, starts), Window(None))
    if window.axis not in dimension_numbers.offset_dims or window.picks:
        raise Blocked("is gathered")
    axis = kept[dimension_numbers.offset_dims.index(window.axis)]
    if slice_sizes[axis] != old[axis]:
        raise Blocked("is gathered in parts")
    return (window.with_axis(axis), Window(None))


def fixed_starts(node: Node) -> list[int] | None:
    """Where a gather cuts its operand, if it is a slice at a place that is written into the
    program: so is indexing where a size is a symbol."""
    place = node.ins[1]
    if place.shape != (1,):
        return None
    place = origin(place, Trait.MOVES | Trait.CASTS)
    if place.literal is None:
        return None
    (along,) = node.params["dimension_numbers"].start_index_map
    rank = len(node.ins[0].shape)
    return [int(np.asarray(place.literal)) if axis == along else 0 for axis in range(rank)]


def _bind_barrier(operands: Operands, target: Shape, /, *, output: int, **_: Any) -> Any:
    return operands[output]  # it only orders the work that is no longer done


@register_axis_rule(_compat.optimization_barrier_p, bind=_bind_barrier)
def _optimization_barrier(node: Node, window: Window, *, output: int, **_: Any) -> Windows:
    return tuple(window if i == output else Window(None) for i in range(len(node.ins)))


def _collapsed(dimension_numbers: Any) -> set[int]:
    """The operand's axes that a gather's slices do not have."""
    return {*dimension_numbers.collapsed_slice_dims, *dimension_numbers.operand_batching_dims}


def _without(node: Node, axes: Collection[int]) -> list[int]:
    """The other axes of a node's first operand."""
    return [i for i in range(len(node.ins[0].shape)) if i not in axes]


def _renumbered(window: Window, axes: Shape) -> Window:
    """A window whose axis `i` is called `axes[i]` in the operand."""
    axis = None if window.axis is None else axes[window.axis]
    return window.with_axis(axis).with_picks([(axes[i], j) for i, j in window.picks])


def _sliced(
    window: Window, old: Shape, new: Shape, starts: Shape, steps: Shape | None = None
) -> Window:
    """The window of an operand of which a slice was taken."""
    axis, steps = window.axis, steps or (1,) * len(starts)
    assert axis is not None
    single = [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if b == 1 and a != 1]
    picks = {i: starts[i] for i in single if i != axis}
    picks |= {i: starts[i] + steps[i] * j for i, j in window.picks}
    start, stride = starts[axis] + steps[axis] * window.start, steps[axis] * window.stride
    return Window(axis, window.size, start, stride).with_picks(list(picks.items()))


def _blocks(old: Shape, new: Shape) -> list[tuple[range, range]]:
    """The smallest runs of axes of both shapes that hold the same elements, the last run first.

    Sizes are only compared for being equal: those of tokens may be symbols.
    """
    behind_old, behind_new = (
        list(itertools.accumulate(reversed(shape), operator.mul, initial=1)) for shape in (old, new)
    )
    blocks = []
    end = len(old), len(new)
    i = j = 0
    while (i, j) != end:
        ends = [
            (m, n)
            for m in range(i, end[0] + 1)
            for n in range(j, end[1] + 1)
            if (m, n) != (i, j) and behind_old[m] == behind_new[n]
        ]
        m, n = min(ends, key=sum, default=end)
        blocks.append((range(end[0] - m, end[0] - i), range(end[1] - n, end[1] - j)))
        i, j = m, n
    return blocks


def _line(shape: Shape, axes: Sequence[int], place: int, step: int, size: int) -> Window | None:
    """Places of a block, `step` apart, as a window; None if they lie on several axes."""
    for axis in axes:
        below = math.prod(shape[i] for i in axes if i > axis)
        start = place // below % shape[axis]
        if step % below == 0 and start + (size - 1) * (step // below) < shape[axis]:
            return Window(axis, size, start, step // below)
    return None


def _picks(shape: Shape, axes: Sequence[int], place: int) -> list[tuple[int, int]]:
    """A place of a block as positions on its axes."""
    below = {axis: math.prod(shape[i] for i in axes if i > axis) for axis in axes}
    return [(axis, place // below[axis] % shape[axis]) for axis in axes if shape[axis] != 1]
