"""The axis rules of operations that move, cut, merge or choose positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import lax
from jax.extend.core import primitives as p

from hire_rewrite import _compat
from hire_rewrite.graph.nodes import Node
from hire_rewrite.patterns.axes import AxisRule, Blocked, register_axis_rule, rerun
from hire_rewrite.patterns.one_hot import chooses, free_axes
from hire_rewrite.patterns.window import Window


@register_axis_rule(p.bitcast_convert_type_p)
class _Bitcast(AxisRule):
    def operands(self, node: Node, window: Window, output: int = 0) -> tuple[Window, ...]:
        if node.ins[0].shape != node.outs[0].shape:
            raise Blocked("is bitcast to numbers of another width")
        return (window,)


@register_axis_rule(p.sharding_constraint_p, *_compat.sharding_casts)
class _Sharding(AxisRule):
    def bind(
        self, node: Node, window: Window, n: int, operands: Sequence[Any], output: int = 0
    ) -> Any:
        return rerun(node, operands)[0]  # a constraint says nothing about a part of the axis


@register_axis_rule(p.broadcast_in_dim_p)
class _BroadcastInDim(AxisRule):
    def operands(self, node: Node, window: Window, output: int = 0) -> tuple[Window, ...]:
        dims, old, new = node.params["broadcast_dimensions"], node.ins[0].shape, node.outs[0].shape

        def source(axis: int | None) -> int | None:
            """The operand's axis that varies along an axis of the result."""
            if axis is None or axis not in dims:
                return None
            here = dims.index(axis)
            return here if old[here] == new[axis] else None

        picks = [(source(axis), position) for axis, position in window.picks]
        kept = [(axis, position) for axis, position in picks if axis is not None]
        return (window.with_axis(source(window.axis)).with_picks(kept),)

    def bind(
        self, node: Node, window: Window, n: int, operands: Sequence[Any], output: int = 0
    ) -> Any:
        shape = window.shape(node.outs[0].shape, n)
        return lax.broadcast_in_dim(operands[0], shape, node.params["broadcast_dimensions"])


@register_axis_rule(p.transpose_p)
class _Transpose(AxisRule):
    def operands(self, node: Node, window: Window, output: int = 0) -> tuple[Window, ...]:
        return (_renumbered(window, node.params["permutation"]),)

    def bind(
        self, node: Node, window: Window, n: int, operands: Sequence[Any], output: int = 0
    ) -> Any:
        return lax.transpose(operands[0], node.params["permutation"])


@register_axis_rule(p.dot_general_p)
class _Choice(AxisRule):
    """A product with one-hot rows, along an axis that only the other operand has."""

    def operands(self, node: Node, window: Window, output: int = 0) -> tuple[Window, ...]:
        chosen = chooses(node)
        if chosen is None:
            raise Blocked("comes from a product that is not linear in a weight along it")
        places = {out: axis for axis, out in free_axes(node, chosen).items()}
        if window.axis not in places or window.picks:
            raise Blocked("is chosen from")
        inner = window.with_axis(places[window.axis])
        return (inner, Window(None)) if chosen == 0 else (Window(None), inner)


@register_axis_rule(p.squeeze_p)
class _Squeeze(AxisRule):
    def operands(self, node: Node, window: Window, output: int = 0) -> tuple[Window, ...]:
        kept = [i for i in range(len(node.ins[0].shape)) if i not in node.params["dimensions"]]
        return (_renumbered(window, kept),)

    def bind(
        self, node: Node, window: Window, n: int, operands: Sequence[Any], output: int = 0
    ) -> Any:
        return lax.squeeze(operands[0], node.params["dimensions"])


@register_axis_rule(p.reshape_p)
class _Reshape(AxisRule):
    """Axes may be merged and split where the window then lies in one axis, the others picked."""

    def operands(self, node: Node, window: Window, output: int = 0) -> tuple[Window, ...]:
        old, new = node.ins[0].shape, node.outs[0].shape
        assert window.axis is not None
        picks: list[tuple[int, int]] = []
        found: Window | None = None
        done: set[int] = set()
        for olds, news in _blocks(old, new):
            here = [i for i in news if i == window.axis or i in window.picked]
            if not here:
                continue
            done.update(here)
            lost = Blocked(f"is split or merged by a reshape from {old} to {new}")
            wide = [i for i in news if new[i] > 1]
            if any(i not in here for i in wide):
                raise lost
            # The window as places in the block, counted in row-major order.
            place, step = 0, 0
            for i in news:
                position = window.picked.get(i, window.start if i == window.axis else 0)
                below = math.prod(new[j] for j in news if j > i)
                place += position * below
                step = window.stride * below if i == window.axis else step
            if window.axis not in news:
                for i in olds:
                    below = math.prod(old[j] for j in olds if j > i)
                    if old[i] > 1:
                        picks.append((i, place // below % old[i]))
                continue
            inside = _line(old, olds, place, step, window.size)
            if inside is None:
                raise lost
            axis, start, stride, inner = inside
            found = Window(axis, window.size, start, stride)
            picks += inner
        if found is None:
            raise Blocked(f"vanishes in a reshape from {old} to {new}")
        return (found.with_picks(picks),)

    def bind(
        self, node: Node, window: Window, n: int, operands: Sequence[Any], output: int = 0
    ) -> Any:
        return lax.reshape(operands[0], window.shape(node.outs[0].shape, n))


@register_axis_rule(p.slice_p)
class _Slice(AxisRule):
    def operands(self, node: Node, window: Window, output: int = 0) -> tuple[Window, ...]:
        starts = node.params["start_indices"]
        steps = node.params["strides"] or (1,) * len(starts)
        return (_sliced(window, node.ins[0].shape, node.outs[0].shape, starts, steps),)

    def bind(
        self, node: Node, window: Window, n: int, operands: Sequence[Any], output: int = 0
    ) -> Any:
        return operands[0]  # every axis that it cuts was cut where the positions were chosen


@register_axis_rule(p.dynamic_slice_p)
class _DynamicSlice(_Slice):
    """A slice at places that are written into the program."""

    def operands(self, node: Node, window: Window, output: int = 0) -> tuple[Window, ...]:
        old, new = node.ins[0].shape, node.outs[0].shape
        starts = []
        for i, place in enumerate(node.ins[1:]):
            if old[i] == new[i]:
                starts.append(0)
            elif place.literal is not None:
                starts.append(min(max(int(np.asarray(place.literal)), 0), old[i] - new[i]))
            else:
                raise Blocked("is sliced at a place that is computed")
        inner = _sliced(window, old, new, starts, (1,) * len(starts))
        return (inner, *(Window(None) for _ in starts))


@register_axis_rule(p.pad_p)
class _Pad(AxisRule):
    """Padding of other axes."""

    def operands(self, node: Node, window: Window, output: int = 0) -> tuple[Window, ...]:
        config = node.params["padding_config"]
        if any(tuple(config[i]) != (0, 0, 0) for i in (window.axis, *window.picked)):
            raise Blocked("is padded")
        return (window, Window(None))

    def bind(
        self, node: Node, window: Window, n: int, operands: Sequence[Any], output: int = 0
    ) -> Any:
        array, value = operands
        return lax.pad(array, value, node.params["padding_config"])


@register_axis_rule(p.gather_p)
class _Gather(AxisRule):
    """Whole rows of a matrix, chosen by another axis (a bias for each expert, say)."""

    def operands(self, node: Node, window: Window, output: int = 0) -> tuple[Window, ...]:
        numbers, sizes = node.params["dimension_numbers"], node.params["slice_sizes"]
        gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
        kept = [i for i in range(len(sizes)) if i not in gone]
        if window.axis not in numbers.offset_dims or window.picks:
            raise Blocked("is gathered")
        axis = kept[numbers.offset_dims.index(window.axis)]
        if sizes[axis] != node.ins[0].shape[axis]:
            raise Blocked("is gathered in parts")
        return (window.with_axis(axis), Window(None))

    def bind(
        self, node: Node, window: Window, n: int, operands: Sequence[Any], output: int = 0
    ) -> Any:
        axis, sizes = self.operands(node, window)[0].axis, node.params["slice_sizes"]
        sizes = tuple(n if i == axis else size for i, size in enumerate(sizes))
        return rerun(node, operands, slice_sizes=sizes)[output]


@register_axis_rule(_compat.split_p)
class _Split(_Slice):
    def operands(self, node: Node, window: Window, output: int = 0) -> tuple[Window, ...]:
        axis, sizes = node.params["axis"], node.params["sizes"]
        old, new = node.ins[0].shape, node.outs[output].shape
        starts = [sum(sizes[:output]) if i == axis else 0 for i in range(len(old))]
        return (_sliced(window, old, new, starts, (1,) * len(starts)),)


@register_axis_rule(_compat.unstack_p)
class _Unstack(AxisRule):
    def operands(self, node: Node, window: Window, output: int = 0) -> tuple[Window, ...]:
        along = node.params["axis"]
        kept = [i for i in range(len(node.ins[0].shape)) if i != along]
        inner = _renumbered(window, kept)
        return (inner.with_picks([*inner.picks, (along, output)]),)

    def bind(
        self, node: Node, window: Window, n: int, operands: Sequence[Any], output: int = 0
    ) -> Any:
        return lax.squeeze(operands[0], (node.params["axis"],))


@register_axis_rule(_compat.optimization_barrier_p)
class _OptimizationBarrier(AxisRule):
    def operands(self, node: Node, window: Window, output: int = 0) -> tuple[Window, ...]:
        return tuple(window if i == output else Window(None) for i in range(len(node.ins)))

    def bind(
        self, node: Node, window: Window, n: int, operands: Sequence[Any], output: int = 0
    ) -> Any:
        return operands[output]  # it only orders the work that is no longer done


def _renumbered(window: Window, axes: Sequence[int]) -> Window:
    """A window whose axis `i` is called `axes[i]` in the operand."""
    axis = None if window.axis is None else axes[window.axis]
    return window.with_axis(axis).with_picks([(axes[i], j) for i, j in window.picks])


def _sliced(
    window: Window,
    old: Sequence[int],
    new: Sequence[int],
    starts: Sequence[int],
    steps: Sequence[int],
) -> Window:
    """The window of an operand of which a slice was taken."""
    assert window.axis is not None
    picks = {i: starts[i] + steps[i] * j for i, j in window.picks}
    for i, (size, kept) in enumerate(zip(old, new, strict=True)):
        if i != window.axis and i not in picks and kept == 1 < size:
            picks[i] = starts[i]
    axis = window.axis
    start, stride = starts[axis] + steps[axis] * window.start, steps[axis] * window.stride
    return Window(axis, window.size, start, stride).with_picks(list(picks.items()))


def _blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of axes of both shapes that hold the same elements."""
    blocks: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        olds, news = [], []
        a = b = 1
        while True:
            if i < len(old) and (a <= b or j >= len(new)):
                a *= old[i]
                olds.append(i)
                i += 1
            elif j < len(new):
                b *= new[j]
                news.append(j)
                j += 1
            if a == b and (olds or i >= len(old)) and (news or j >= len(new)):
                break
            if i >= len(old) and j >= len(new):
                break
        blocks.append((olds, news))
    return blocks


def _line(
    shape: Sequence[int], axes: Sequence[int], place: int, step: int, size: int
) -> tuple[int, int, int, list[tuple[int, int]]] | None:
    """Places of a block, `step` apart, as (axis, start, stride, picks); None if on several axes."""
    for axis in axes:
        below = math.prod(shape[i] for i in axes if i > axis)
        start = place // below % shape[axis]
        if step % below or start + (size - 1) * (step // below) >= shape[axis]:
            continue
        inner = [
            (i, place // math.prod(shape[j] for j in axes if j > i) % shape[i])
            for i in axes
            if i != axis and shape[i] > 1
        ]
        return axis, start, step // below, inner
    return None
