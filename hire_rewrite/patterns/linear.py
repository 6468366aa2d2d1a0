"""Linear layers: products of an activation with a weight, and those of a scope."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Mapping
from typing import Any

from jax.extend.core import primitives as p

from hire_rewrite.graph.nodes import Node, Uses, Value
from hire_rewrite.graph.provenance import Provenance
from hire_rewrite.graph.sources import body_of
from hire_rewrite.graph.trace import Trace
from hire_rewrite.graph.traits import Trait, has
from hire_rewrite.patterns.axes import Window, origin
from hire_rewrite.patterns.refusal import NoMatch, Refusal


@dataclasses.dataclass(frozen=True, eq=False)
class Linear:
    """The product of an activation `x` with a `weight`, in either order.

    Attributes:
      x_axes, weight_in: the axes that are contracted, in the same order.
      free: the other axes of the weight, as pairs (axis of the weight, axis of the result).
      batch: axes that both have (a weight for each expert), as triples (axis of x, of the weight,
        of the result).
    """

    node: Node
    x: Value
    x_axes: tuple[int, ...]
    weight: Value
    weight_in: tuple[int, ...]
    free: tuple[tuple[int, int], ...]
    batch: tuple[tuple[int, int, int], ...] = ()

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
    def weight_layout(self) -> tuple[tuple[int, ...], ...]:
        """The axes of the weight by what they are: of its rows, of a row, and of experts."""
        rows = tuple(axis for axis, _ in self.free)
        return rows, self.weight_in, tuple(axis for _, axis, _ in self.batch)

    @property
    def tokens(self) -> int:
        """Rows that are multiplied with the weight, or with each expert's."""
        fixed = {*self.out_axes, *(axis for *_, axis in self.batch)}
        return math.prod(size for i, size in enumerate(self.out.shape) if i not in fixed)

    def weight_axis(self, out_axis: int) -> int | None:
        """The axis of the weight that is an axis of the result."""
        return next((axis for axis, out in self.free if out == out_axis), None)

    def weight_window(self, window: Window) -> Window:
        """A window of the result as one of the weight, whatever axes tokens have."""
        axes = {out: axis for axis, out in self.free} | {out: axis for _, axis, out in self.batch}
        picks = [(axes[axis], place) for axis, place in window.picks]
        own = None if window.axis is None else axes[window.axis]
        return window.with_axis(own).with_picks(picks)

    def experts(self, window: Window | None = None) -> int:
        """How many weights lie side by side, where a window of the result is read."""
        axes = [axis for _, axis, _ in self.batch]
        if window is not None:
            axes += [axis for axis, _ in self._unread(window)]
        return math.prod(self.weight.shape[axis] for axis in axes)

    def expert_axes(self, window: Window | None = None) -> tuple[int | None, int, int] | None:
        """The only axis of experts: that of x (None if all read the same), weight and result."""
        unread = [] if window is None else self._unread(window)
        wide = [(None, *axes) for axes in unread if self.weight.shape[axes[0]] > 1]
        axes = [*self.batch, *wide]
        return axes[0] if len(axes) == 1 else None

    def _unread(self, window: Window) -> list[tuple[int, int]]:
        """The free axes that are neither a window's nor picked by it."""
        return [(axis, out) for axis, out in self.free if out not in window.axes]


def as_linear(node: Node, provenance: Provenance) -> Linear | None:
    """The linear layer that a node computes; None if it is not a product with one weight.

    Raises:
      NoMatch: the weight is chosen by an activation, or holds no numbers, or it is a convolution
        over more than one position.
    """
    if not has(node.primitive, Trait.MULTIPLIES):
        return None
    is_weight = [provenance.is_weight(value) for value in node.ins[:2]]
    if is_weight[0] == is_weight[1]:
        for value in () if all(is_weight) else node.ins[:2]:
            if chosen_from(value, provenance) is not None:
                raise NoMatch(Refusal.CHOSEN_AT_RUN_TIME, _chosen_how(value), node)
        return None
    side = is_weight.index(True)
    if any(isinstance(size, int) and size == 0 for size in node.ins[side].shape):
        raise NoMatch(
            Refusal.UNSUPPORTED, "its weight has an axis of size 0: nothing is read", node
        )
    if node.primitive is p.dot_general_p:
        return _dot(node, side, **node.params)
    if node.primitive is p.conv_general_dilated_p:
        return _convolution(node, **node.params) if side == 1 else None
    groups = node.params["ragged_dot_dimension_numbers"].rhs_group_dimensions
    if side == 1 and groups:
        experts = math.prod(node.ins[1].shape[axis] for axis in groups)
        reason = f"which of its {experts} experts a token takes is known at run time (ragged_dot)"
        raise NoMatch(Refusal.UNSUPPORTED, reason, node)
    return None


def _dot(node: Node, side: int, *, dimension_numbers: Any, **_: Any) -> Linear | None:
    contracting, batch = dimension_numbers
    if not contracting[side]:
        return None  # an outer product
    shared = enumerate(zip(batch[side], batch[1 - side], strict=True))
    return Linear(
        node,
        node.ins[1 - side],
        tuple(contracting[1 - side]),
        node.ins[side],
        tuple(contracting[side]),
        tuple(free_axes(node, side).items()),
        tuple((axis, weight_axis, i) for i, (weight_axis, axis) in shared),
    )


def _convolution(
    node: Node,
    *,
    dimension_numbers: Any,
    feature_group_count: int,
    batch_group_count: int,
    **params: Any,
) -> Linear:
    """A convolution whose window is one position is a product with a matrix."""
    x, weight = node.ins
    out_axis, in_axis, *window = dimension_numbers.rhs_spec
    plain = all(
        all(entry in (1, (0, 0)) for entry in params[name])
        for name in ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
    )
    plain = plain and feature_group_count == batch_group_count == 1
    if any(weight.shape[i] != 1 for i in window):
        reason = f"a convolution over {[weight.shape[i] for i in window]} positions"
        raise NoMatch(Refusal.CONVOLUTION, reason, node)
    if not plain or dimension_numbers.lhs_spec != dimension_numbers.out_spec:
        reason = "a convolution with strides, padding, groups or another layout"
        raise NoMatch(Refusal.CONVOLUTION, reason, node)
    x_axis, result_axis = dimension_numbers.lhs_spec[1], dimension_numbers.out_spec[1]
    return Linear(node, x, (x_axis,), weight, (in_axis,), ((out_axis, result_axis),))


_UNCHANGED = Trait.MOVES | Trait.KEEPS | Trait.CASTS


def chosen_from(value: Value, provenance: Provenance) -> Value | None:
    """The stack of matrices that a matrix is cut out of, at a place that is not a weight; or one of
    the weights between which something that is not a weight selects."""
    node = origin(value, _UNCHANGED).node
    if node is None:
        return None
    if node.primitive is p.select_n_p:
        cases = node.ins[1:]
        matrices = len(value.shape) > 1 and all(map(provenance.is_weight, cases))
        return next(filter(provenance.roots, cases), None) if matrices else None
    if node.primitive not in (p.dynamic_slice_p, p.gather_p):
        return None
    stack = node.ins[0]
    return stack if provenance.is_weight(stack) and len(stack.shape) > 2 else None


def _chosen_how(value: Value) -> str:
    """Why a weight that `chosen_from` finds is none for a linear layer."""
    node = origin(value, _UNCHANGED).node
    if node is not None and node.primitive is p.select_n_p:
        return (
            "the weight is selected by a value that is not a weight: jax.vmap makes that of a cond "
            "or a switch whose condition differs along the axis, and computes all branches"
        )
    return (
        "the weight is cut out at a place that is not a weight and not a counter of a loop of "
        "known length (scan, fori_loop with fixed bounds): an expert, a task or a layer that is "
        "chosen at run time"
    )


def is_one_hot(value: Value) -> bool:
    """Whether a value is made of a comparison of numbers with all numbers of a range.

    It may have been moved, cast, scaled or smoothed since.
    """
    through = Trait.MOVES | Trait.KEEPS | Trait.LINEAR
    while value.node is not None and has(value.node.primitive, through):
        inner = [v for v in value.node.ins if v.literal is None and v.shape]
        if not inner:
            return False
        value = inner[0]
    return value.node is not None and value.node.primitive is p.eq_p


def outer_value(value: Value) -> Value:
    """What a value is, looking through casts and moves, and out of the loops that it is read in."""
    while True:
        inner = origin(value, _UNCHANGED)
        if inner.is_input and inner.scope.parent is not None:
            body, i = body_of(inner)
            if body.inputs[i].role in ("const", "slice"):
                inner = body.inputs[i].outer
        if inner is value:
            return value
        value = inner


def free_axes(product: Node, position: int) -> dict[int, int]:
    """The axes of an operand that a `dot_general` neither contracts nor shares, to the result's."""
    contracting, batch = product.params["dimension_numbers"]
    frees = [
        [i for i in range(len(v.shape)) if i not in contracting[s] and i not in batch[s]]
        for s, v in enumerate(product.ins)
    ]
    first = len(batch[0]) + (len(frees[0]) if position == 1 else 0)
    return {axis: first + i for i, axis in enumerate(frees[position])}


@dataclasses.dataclass(frozen=True, eq=False)
class MatchContext:
    """A scope, and the sites that were matched in it so far.

    Attributes:
      linears: the linear layers of the scope, by their products.
      taken: the nodes that belong to a site, with its match.
      cache: what was found out about code, by the code: layers are mostly alike. Shared by all
        scopes of a function.
    """

    trace: Trace
    linears: Mapping[Node, Linear]
    taken: dict[Node, Any] = dataclasses.field(default_factory=dict)
    cache: dict[Hashable, Any] = dataclasses.field(default_factory=dict)

    @property
    def provenance(self) -> Provenance:
        return self.trace.provenance

    @property
    def uses(self) -> Uses:
        """Who reads a value, as far as anybody needs it."""
        return self.trace.live


def product_with_argument(context: MatchContext, node: Node, axis: int | None) -> str | None:
    """Why a product with an argument that is not a weight is not a linear layer; None if it is
    a product of others.

    Args:
      axis: of its result, along which it would have to be linear in a weight.
    """
    if node.primitive is not p.dot_general_p:
        return None
    sides = [i for i in (0, 1) if axis in free_axes(node, i).values()]
    root = outer_value(node.ins[sides[0]]) if sides else None
    if root is None or not root.is_input or root.scope.parent is not None:
        return None
    trace = context.trace
    argument = trace.arguments[trace.scope.inputs.index(root)]
    where = "a keyword argument: give it by position, and"
    if argument.position is not None:
        where = f"argument {argument.position}:"
    return (
        f"its input axis comes from a product with {trace.path(root)}, which is not a weight "
        f"but in {where} add it to weights= if it holds weights"
    )
