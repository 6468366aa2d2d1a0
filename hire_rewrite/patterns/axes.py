"""Operations that act separately on each position of an axis.

For such an operation, position `i` of an axis of its result depends only on position `i` of an
axis of each operand (or on some other position that the shapes tell, where it slices or reshapes).
An axis rule says which positions of each operand belong to a `Window` of the result, and how to run
the operation on some of them: whatever is built of such operations may be computed neuron by
neuron. Pointwise primitives (see `traits`) need no rule. Others register a function that is given
the equation's parameters by name:

    @register_axis_rule(my_primitive)
    def _my_rule(node, window, *, dimensions, **_):
        return (window.with_axis(dimensions[window.axis]),)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from jax.extend.core import primitives as p

from hire_rewrite.graph.evaluate import evaluate_part
from hire_rewrite.graph.nodes import Node, Value
from hire_rewrite.graph.traits import Trait, has


@dataclasses.dataclass(frozen=True, slots=True)
class Window:
    """The positions `start, start + stride, ...` of `axis`, `size` of them.

    `picks` are pairs (axis, position) of axes of which one position alone is meant. `axis` is None
    for an array that is the same for all positions. An array *in* a window has `n` positions on
    `axis` (some or all of the window's) and one on each picked axis.
    """

    axis: int | None
    size: int = 1
    start: int = 0
    stride: int = 1
    picks: tuple[tuple[int, int], ...] = ()

    def with_axis(self, axis: int | None) -> Window:
        return dataclasses.replace(self, axis=axis)

    def with_picks(self, picks: Sequence[tuple[int, int]]) -> Window:
        return dataclasses.replace(self, picks=tuple(sorted(picks)))

    @property
    def picked(self) -> dict[int, int]:
        return dict(self.picks)

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes of which not all positions are meant, its own first."""
        return (*(() if self.axis is None else (self.axis,)), *self.picked)

    def shape(self, full: Sequence[int], n: int) -> tuple[int, ...]:
        """The shape of an array in the window that is `full` outside it."""
        picked = self.picked
        return tuple(
            n if i == self.axis else 1 if i in picked else size for i, size in enumerate(full)
        )

    def tokens(self, full: Sequence[int]) -> int:
        """The positions of the axes that are neither `axis` nor picked."""
        return math.prod(size for i, size in enumerate(full) if i not in self.axes)

    def cut(self, axis: int) -> tuple[int, int, int]:
        """(start, stop, stride) of a slice of one of its axes."""
        if axis == self.axis:
            return self.start, self.start + (self.size - 1) * self.stride + 1, self.stride
        position = self.picked[axis]
        return position, position + 1, 1


Windows = tuple[Window, ...]


class Blocked(Exception):  # noqa: N818 (a finding, not an error)
    """The operation mixes positions of the axis; the message completes "the axis ..."."""


_rules: dict[Any, Callable[..., Windows]] = {}
_binds: dict[Any, Callable[..., Any]] = {}


def register_axis_rule(
    *primitives: Any, bind: Callable[..., Any] | None = None
) -> Callable[[Callable[..., Windows]], Callable[..., Windows]]:
    """Function decorator: the rule for `primitives`.

    The function is called as `(node, window, *, output, **params)` with a window of a result, and
    returns the windows of the operands that belong to it, or raises `Blocked`.

    Args:
      bind: called as `(operands, shape, /, *, output, **params)` with operands in their windows,
        returns the result, which has that shape. None where the equation does so as it is.
    """

    def register(operands: Callable[..., Windows]) -> Callable[..., Windows]:
        _rules.update(dict.fromkeys(primitives, operands))
        _binds.update({} if bind is None else dict.fromkeys(primitives, bind))
        return operands

    return register


def has_axis_rule(primitive: Any) -> bool:
    """Whether anything is known about an operation on a part of an axis."""
    return primitive in _rules or has(primitive, Trait.POINTWISE)


def operand_windows(node: Node, window: Window, output: int = 0) -> Windows:
    """The windows of the operands that belong to one of a result.

    Raises:
      Blocked: none do, for the operation mixes positions.
    """
    rule: Callable[..., Windows] = _rules.get(node.primitive, _same_places)
    return rule(node, window, output=output, **node.params)


def run_part(node: Node, operands: Sequence[Any], shape: Sequence[int], output: int = 0) -> Any:
    """A result in a window, where it has that shape, from operands in theirs."""
    if node.primitive not in _binds:
        return evaluate_part(node, operands)[output]
    return _binds[node.primitive](operands, shape, output=output, **node.params)


def origin(value: Value, through: Trait) -> Value:
    """What a value is made of, looking through operations of some traits."""
    while value.node is not None and has(value.node.primitive, through):
        value = value.node.ins[0]
    return value


def ordered_axis(node: Node) -> int:
    """The axis along which an operation orders or accumulates numbers."""
    rank = len(node.ins[0].shape)
    names = ("axis", "dimension", "reduction_dimension")
    axis: int = next((node.params[name] for name in names if name in node.params), rank - 1)
    return axis % rank


def result_axis(node: Node, position: int, axis: int, output: int = 0) -> tuple[int, int] | None:
    """The axis of a result that belongs to an axis of an operand, or None.

    Returns:
      The axis, and the position of the operand that its position 0 comes from: it may be a slice.
    """
    if not has_axis_rule(node.primitive):
        return None
    size = node.ins[position].shape[axis]
    for candidate, extent in enumerate(node.outs[output].shape):
        if not (isinstance(extent, int) and 0 < extent <= size):
            continue
        try:
            window = operand_windows(node, Window(candidate, extent), output)[position]
        except Blocked:
            continue
        if window.axis == axis and window.stride == 1:
            return candidate, window.start
    return None


def keeps_tokens(
    node: Node, operand: Value, inner: Window, window: Window, output: int = 0
) -> bool:
    """Whether the other axes of an operand are those of the result, in number and order."""
    if node.primitive is p.dot_general_p:
        return True
    old, new = operand.shape, node.outs[output].shape
    if inner.tokens(old) != window.tokens(new):
        return False
    if node.primitive is not p.transpose_p:
        return True
    rest = [i for i in node.params["permutation"] if i not in inner.axes and old[i] != 1]
    return rest == sorted(rest)


def _same_places(node: Node, window: Window, *, output: int, **_: Any) -> Windows:
    """Of pointwise operations."""
    new = node.outs[output].shape
    return tuple(_broadcast(window, value.shape, new) for value in node.ins)


def _broadcast(window: Window, old: Sequence[int], new: Sequence[int]) -> Window:
    """The window of an operand of the result's rank, or one that is the same everywhere."""
    if len(old) != len(new):
        return Window(None)
    axis = window.axis if window.axis is not None and old[window.axis] == new[window.axis] else None
    return window.with_axis(axis).with_picks([(i, j) for i, j in window.picks if old[i] == new[i]])
