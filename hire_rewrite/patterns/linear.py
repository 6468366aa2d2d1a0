"""Linear layers: products of an activation with a weight."""

from __future__ import annotations

import dataclasses

from jax.extend.core import primitives as p

from hire_rewrite.patterns.graph import Node, Value
from hire_rewrite.patterns.miss import Miss
from hire_rewrite.patterns.provenance import Provenance

__all__ = ["Linear", "as_linear", "chosen_from"]

_LAYOUT = frozenset({p.transpose_p, p.reshape_p, p.squeeze_p, p.convert_element_type_p, p.copy_p})


@dataclasses.dataclass(frozen=True, eq=False)
class Linear:
    """`dot_general(x, weight)` in either order, over one axis of each.

    The result has the axes of `x` without `x_axis`, in order, and one axis, `out_axis`, of the
    weight's `out_dim` positions.
    """

    node: Node
    x: Value
    x_axis: int
    weight: Value
    weight_in: int
    """The axis of the weight that is contracted."""
    weight_out: int
    """The axis of the weight that remains."""
    out_axis: int

    @property
    def in_dim(self) -> int:
        return self.weight.shape[self.weight_in]

    @property
    def out_dim(self) -> int:
        return self.weight.shape[self.weight_out]

    @property
    def out(self) -> Value:
        return self.node.outs[0]

    @property
    def token_shape(self) -> tuple[int, ...]:
        """The axes of `x` that are not contracted."""
        return tuple(size for i, size in enumerate(self.x.shape) if i != self.x_axis)


def as_linear(node: Node, provenance: Provenance) -> Linear | None:
    """The linear layer that a node computes; None if it is no product with one weight.

    Raises:
      Miss: a product with a weight, but over several axes, or a batch of weights, or the weight
        is chosen by an activation.
    """
    if node.primitive is not p.dot_general_p:
        return None
    is_weight = [provenance.is_weight(value) for value in node.ins]
    contracting, batch = node.params["dimension_numbers"]
    if is_weight[0] == is_weight[1]:
        for value in () if batch[0] or all(is_weight) else node.ins:
            if chosen_from(value, provenance) is not None:
                raise Miss(
                    "the weight is cut out at a place that is no weight and no counter of a loop "
                    "of known length (scan, or fori_loop with fixed bounds)",
                    node,
                )
        return None
    side = is_weight.index(True)
    x, weight = node.ins[1 - side], node.ins[side]
    (x_axes, weight_axes) = (contracting[1 - side], contracting[side])
    if batch[side]:
        raise Miss("the weight has a batch axis (experts)", node)
    free = [i for i in range(len(weight.shape)) if i not in weight_axes]
    if len(weight_axes) != 1 or len(free) != 1:
        raise Miss(
            f"the weight {list(weight.shape)} contracts {len(weight_axes)} and keeps "
            f"{len(free)} axes; one of each is understood",
            node,
        )
    out_axis = 0 if side == 0 else len(node.outs[0].shape) - 1
    return Linear(node, x, x_axes[0], weight, weight_axes[0], free[0], out_axis)


def chosen_from(value: Value, provenance: Provenance) -> Value | None:
    """The stack of matrices that a matrix is cut out of, at a place that is no weight."""
    while value.node is not None and value.node.primitive in _LAYOUT:
        value = value.node.ins[0]
    node = value.node
    if node is None or node.primitive not in (p.dynamic_slice_p, p.gather_p):
        return None
    stack = node.ins[0]
    return stack if provenance.is_weight(stack) and len(stack.shape) > 2 else None
