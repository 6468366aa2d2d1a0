"""Linear layers: products of an activation with a weight."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from jax.extend.core import primitives as p

from hire_rewrite import _compat
from hire_rewrite.graph.nodes import Node, Value
from hire_rewrite.graph.provenance import Provenance
from hire_rewrite.patterns.miss import Miss
from hire_rewrite.patterns.one_hot import free_axes
from hire_rewrite.patterns.window import Window

__all__ = ["Linear", "as_linear", "chosen_from", "is_product", "wide_axes"]

_LAYOUT = frozenset({p.transpose_p, p.reshape_p, p.squeeze_p, p.convert_element_type_p, p.copy_p})
_PRODUCTS = frozenset({p.dot_general_p, p.conv_general_dilated_p, _compat.ragged_dot_general_p})


@dataclasses.dataclass(frozen=True, eq=False)
class Linear:
    """The product of an activation `x` with a `weight`, in either order.

    Attributes:
      x_axes, weight_in: the axes that are contracted, in the same order.
      free: the other axes of the weight, as pairs (axis of the weight, axis of the result).
      batch: axes that both have (a weight for each expert), as triples (axis of x, of the weight,
        of the result).
      grouped: the weight's axis of experts that take runs of tokens (`ragged_dot`), or None.
    """

    node: Node
    x: Value
    x_axes: tuple[int, ...]
    weight: Value
    weight_in: tuple[int, ...]
    free: tuple[tuple[int, int], ...]
    batch: tuple[tuple[int, int, int], ...] = ()
    grouped: int | None = None

    @property
    def out(self) -> Value:
        return self.node.outs[0]

    @property
    def in_dim(self) -> int:
        return math.prod(self.weight.shape[i] for i in self.weight_in)

    @property
    def out_dim(self) -> int:
        return math.prod(self.weight.shape[i] for i, _ in self.free)

    @property
    def out_axes(self) -> tuple[int, ...]:
        """The axes of the result that are the weight's own."""
        return tuple(axis for _, axis in self.free)

    @property
    def tokens(self) -> int:
        """Rows that are multiplied with the weight, or with each expert's."""
        shared = math.prod(self.out.shape[axis] for _, _, axis in self.batch)
        return math.prod(self.out.shape) // (self.out_dim * shared)

    def weight_axis(self, out_axis: int) -> int | None:
        """The axis of the weight that is an axis of the result."""
        return next((axis for axis, out in self.free if out == out_axis), None)

    def experts(self, window: Window | None = None) -> int:
        """How many weights lie side by side, where a window of the result is read."""
        axes = [axis for _, axis, _ in self.batch]
        if self.grouped is not None:
            axes.append(self.grouped)
        if window is not None:
            read = {window.axis, *window.picked}
            axes += [axis for axis, out in self.free if out not in read]
        return math.prod(self.weight.shape[axis] for axis in axes)

    def expert_axes(self, window: Window | None = None) -> tuple[int | None, int, int] | None:
        """The only axis of experts: that of x (None if all read the same), weight and result."""
        read = () if window is None else (window.axis, *window.picked)
        free = [] if window is None else [(a, out) for a, out in self.free if out not in read]
        wide = [(a, out) for a, out in free if self.weight.shape[a] > 1]
        if self.grouped is None and len(self.batch) + len(wide) == 1:
            return self.batch[0] if self.batch else (None, *wide[0])
        return None


def is_product(node: Node) -> bool:
    """Whether a node multiplies matrices."""
    return node.primitive in _PRODUCTS


def as_linear(node: Node, provenance: Provenance) -> Linear | None:
    """The linear layer that a node computes; None if it is no product with one weight.

    Raises:
      Miss: a product with a weight that is chosen by an activation, or a convolution over more
        than one position.
    """
    if not is_product(node):
        return None
    is_weight = [provenance.is_weight(value) for value in node.ins[:2]]
    if is_weight[0] == is_weight[1]:
        for value in () if all(is_weight) else node.ins[:2]:
            if chosen_from(value, provenance) is not None:
                raise Miss(
                    "the weight is cut out at a place that is no weight and no counter of a loop "
                    "of known length (scan, fori_loop with fixed bounds): an expert, a task or a "
                    "layer that is chosen at run time",
                    node,
                )
        return None
    side = is_weight.index(True)
    if node.primitive is p.conv_general_dilated_p:
        return _convolution(node, side)
    if node.primitive is p.dot_general_p:
        return _dot(node, side)
    return _ragged_dot(node, side)


def _dot(node: Node, side: int) -> Linear | None:
    contracting, batch = node.params["dimension_numbers"]
    x, weight = node.ins[1 - side], node.ins[side]
    weight_in, shared = contracting[side], batch[side]
    if not weight_in:
        return None  # an outer product
    return Linear(
        node,
        x,
        tuple(contracting[1 - side]),
        weight,
        tuple(weight_in),
        tuple(free_axes(node, side).items()),
        tuple((b, a, i) for i, (a, b) in enumerate(zip(shared, batch[1 - side], strict=True))),
    )


def _ragged_dot(node: Node, side: int) -> Linear | None:
    numbers = node.params["ragged_dot_dimension_numbers"]
    (contracting, batch) = numbers.dot_dimension_numbers
    groups = list(numbers.rhs_group_dimensions)
    if side != 1 or batch[0] or len(groups) != 1:
        return None
    x, weight = node.ins[:2]
    free = [i for i in range(len(weight.shape)) if i not in (*contracting[1], *groups)]
    first = len(x.shape) - len(contracting[0])
    return Linear(
        node,
        x,
        tuple(contracting[0]),
        weight,
        tuple(contracting[1]),
        tuple((axis, first + i) for i, axis in enumerate(free)),
        grouped=groups[0],
    )


def _convolution(node: Node, side: int) -> Linear | None:
    """A convolution whose window is one position is a product with a matrix."""
    if side != 1:
        return None
    params, weight = node.params, node.ins[1]
    numbers = params["dimension_numbers"]
    out_axis, in_axis, *window = numbers.rhs_spec
    plain = all(
        all(entry in (1, (0, 0)) for entry in params[name])
        for name in ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
    )
    counts = (params["feature_group_count"], params["batch_group_count"])
    if any(weight.shape[i] != 1 for i in window):
        raise Miss(f"a convolution over {[weight.shape[i] for i in window]} positions", node)
    if not plain or counts != (1, 1) or numbers.lhs_spec != numbers.out_spec:
        raise Miss("a convolution with strides, padding, groups or another layout", node)
    return Linear(
        node,
        node.ins[0],
        (numbers.lhs_spec[1],),
        weight,
        (in_axis,),
        ((out_axis, numbers.out_spec[1]),),
    )


def chosen_from(value: Value, provenance: Provenance) -> Value | None:
    """The stack of matrices that a matrix is cut out of, at a place that is no weight."""
    while value.node is not None and value.node.primitive in _LAYOUT:
        value = value.node.ins[0]
    node = value.node
    if node is None or node.primitive not in (p.dynamic_slice_p, p.gather_p):
        return None
    stack = node.ins[0]
    return stack if provenance.is_weight(stack) and len(stack.shape) > 2 else None


def wide_axes(shape: Sequence[int], axes: Sequence[int]) -> list[int]:
    """Those of the axes that have more than one position, the longest first."""
    return sorted((axis for axis in axes if shape[axis] > 1), key=lambda axis: -shape[axis])
