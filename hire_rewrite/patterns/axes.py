"""Operations that act separately on each position of an axis.

For such an operation, position `i` of an axis of its result depends only on position `i` of an
axis of each operand. An `AxisRule` says which axis of each operand that is, and how to run the
operation when only some of the positions are kept. This is the whole knowledge of the matcher
about activations: whatever is built from registered operations may be computed neuron by neuron.

To teach the matcher a new operation, register a rule for its primitive:

    @register_axis_rule(my_primitive)
    class MyRule(AxisRule): ...
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from jax import lax
from jax.extend.core import primitives as p

from hire_rewrite import _compat
from hire_rewrite.patterns.graph import Node, Value

__all__ = [
    "AxisRule",
    "Blocked",
    "Operand",
    "axis_rules",
    "keeps_tokens",
    "register_axis_rule",
    "result_axis",
]


@dataclasses.dataclass(frozen=True, slots=True)
class Operand:
    """The axis of an operand that belongs to the result's axis.

    `axis` is None if the operand is the same for every position. `start` is the position of the
    operand that position 0 of the result comes from (not 0 where the operation slices the axis).
    """

    axis: int | None
    start: int = 0


class Blocked(Exception):  # noqa: N818 (a finding, not an error)
    """The operation mixes positions of the axis; the message completes "the axis ..."."""


class AxisRule:
    """The rule of elementwise operations; others override its methods."""

    def operands(self, node: Node, axis: int, output: int = 0) -> tuple[Operand, ...]:
        """The axes of the operands that belong to `axis` of a result; raises `Blocked`."""
        rank, size = len(node.outs[output].shape), node.outs[output].shape[axis]
        return tuple(
            Operand(axis if len(v.shape) == rank and v.shape[axis] == size else None)
            for v in node.ins
        )

    def bind(
        self, node: Node, axis: int, size: int, operands: Sequence[Any], output: int = 0
    ) -> Any:
        """A result of the operation with `size` positions on its `axis`."""
        return node.primitive.bind(*operands, **node.params)


axis_rules: dict[Any, AxisRule] = {}


def register_axis_rule(*primitives: Any) -> Callable[[type[AxisRule]], type[AxisRule]]:
    """Class decorator: the rule for `primitives`."""

    def register(rule: type[AxisRule]) -> type[AxisRule]:
        axis_rules.update(dict.fromkeys(primitives, rule()))
        return rule

    return register


def result_axis(node: Node, position: int, axis: int) -> int | None:
    """The axis of the (only) result that belongs to `axis` of an operand, or None."""
    rule = axis_rules.get(node.primitive)
    if rule is None or len(node.outs) != 1:
        return None
    size = node.ins[position].shape[axis]
    for candidate, extent in enumerate(node.outs[0].shape):
        if extent != size:
            continue
        try:
            operand = rule.operands(node, candidate)[position]
        except Blocked:
            continue
        if operand == Operand(axis):
            return candidate
    return None


def keeps_tokens(node: Node, operand: Value, operand_axis: int, axis: int, output: int = 0) -> bool:
    """Whether the other axes of an operand are those of the result, in number and order."""
    old, new = operand.shape, node.outs[output].shape
    if math.prod(old) * new[axis] != math.prod(new) * old[operand_axis]:
        return False
    if node.primitive is not p.transpose_p:
        return True
    rest = [i for i in node.params["permutation"] if i != operand_axis and old[i] > 1]
    return rest == sorted(rest)


register_axis_rule(
    *(p.abs_p, p.acos_p, p.acosh_p, p.add_p, p.and_p, p.asin_p, p.asinh_p, p.atan2_p),
    *(p.atan_p, p.atanh_p, p.cbrt_p, p.ceil_p, p.clamp_p, p.convert_element_type_p, p.copy_p),
    *(p.cos_p, p.cosh_p, p.digamma_p, p.div_p, p.eq_p, p.erf_inv_p, p.erf_p, p.erfc_p),
    *(p.exp2_p, p.exp_p, p.expm1_p, p.floor_p, p.ge_p, p.gt_p, p.integer_pow_p),
    *(p.is_finite_p, p.le_p, p.lgamma_p, p.log1p_p, p.log_p, p.logistic_p, p.lt_p, p.max_p),
    *(p.min_p, p.mul_p, p.name_p, p.ne_p, p.neg_p, p.nextafter_p, p.not_p, p.or_p, p.pow_p),
    *(p.reduce_precision_p, p.rem_p, p.round_p, p.rsqrt_p, p.select_n_p, p.sign_p, p.sin_p),
    *(p.shift_left_p, p.shift_right_arithmetic_p, p.shift_right_logical_p),
    *(p.sinh_p, p.sqrt_p, p.square_p, p.stop_gradient_p, p.sub_p, p.tan_p, p.tanh_p, p.xor_p),
)(AxisRule)


@register_axis_rule(p.bitcast_convert_type_p)
class _Bitcast(AxisRule):
    def operands(self, node: Node, axis: int, output: int = 0) -> tuple[Operand, ...]:
        if node.ins[0].shape != node.outs[0].shape:
            raise Blocked("is bitcast to numbers of another width")
        return (Operand(axis),)


@register_axis_rule(p.sharding_constraint_p)
class _ShardingConstraint(AxisRule):
    def bind(
        self, node: Node, axis: int, size: int, operands: Sequence[Any], output: int = 0
    ) -> Any:
        return operands[0]  # a constraint on the full axis says nothing about a part of it


@register_axis_rule(p.broadcast_in_dim_p)
class _BroadcastInDim(AxisRule):
    def operands(self, node: Node, axis: int, output: int = 0) -> tuple[Operand, ...]:
        dims = node.params["broadcast_dimensions"]
        if axis not in dims:
            return (Operand(None),)
        source = dims.index(axis)
        same = node.ins[0].shape[source] == node.outs[0].shape[axis]
        return (Operand(source if same else None),)

    def bind(
        self, node: Node, axis: int, size: int, operands: Sequence[Any], output: int = 0
    ) -> Any:
        shape = _replaced(node.params["shape"], axis, size)
        return lax.broadcast_in_dim(operands[0], shape, node.params["broadcast_dimensions"])


@register_axis_rule(p.transpose_p)
class _Transpose(AxisRule):
    def operands(self, node: Node, axis: int, output: int = 0) -> tuple[Operand, ...]:
        return (Operand(node.params["permutation"][axis]),)

    def bind(
        self, node: Node, axis: int, size: int, operands: Sequence[Any], output: int = 0
    ) -> Any:
        return lax.transpose(operands[0], node.params["permutation"])


@register_axis_rule(p.squeeze_p)
class _Squeeze(AxisRule):
    def operands(self, node: Node, axis: int, output: int = 0) -> tuple[Operand, ...]:
        kept = [i for i in range(len(node.ins[0].shape)) if i not in node.params["dimensions"]]
        return (Operand(kept[axis]),)

    def bind(
        self, node: Node, axis: int, size: int, operands: Sequence[Any], output: int = 0
    ) -> Any:
        return lax.squeeze(operands[0], node.params["dimensions"])


@register_axis_rule(p.reshape_p)
class _Reshape(AxisRule):
    """The axis survives if as many elements stand before it on both sides, and it is as long."""

    def operands(self, node: Node, axis: int, output: int = 0) -> tuple[Operand, ...]:
        old, new = node.ins[0].shape, node.outs[0].shape
        before, size = math.prod(new[:axis]), new[axis]
        for source, extent in enumerate(old):
            if extent == size and math.prod(old[:source]) == before:
                return (Operand(source),)
        raise Blocked(f"is split or merged by a reshape from {old} to {new}")

    def bind(
        self, node: Node, axis: int, size: int, operands: Sequence[Any], output: int = 0
    ) -> Any:
        return lax.reshape(operands[0], _replaced(node.params["new_sizes"], axis, size))


@register_axis_rule(p.slice_p)
class _Slice(AxisRule):
    def operands(self, node: Node, axis: int, output: int = 0) -> tuple[Operand, ...]:
        strides = node.params["strides"]
        if strides is not None and strides[axis] != 1:
            raise Blocked("is sliced with a stride")
        return (Operand(axis, node.params["start_indices"][axis]),)

    def bind(
        self, node: Node, axis: int, size: int, operands: Sequence[Any], output: int = 0
    ) -> Any:
        # The window of the axis was cut where the positions were chosen.
        starts = _replaced(node.params["start_indices"], axis, 0)
        limits = _replaced(node.params["limit_indices"], axis, size)
        return lax.slice(operands[0], starts, limits, node.params["strides"])


@register_axis_rule(_compat.split_p)
class _Split(AxisRule):
    def operands(self, node: Node, axis: int, output: int = 0) -> tuple[Operand, ...]:
        along = node.params["axis"] == axis
        return (Operand(axis, sum(node.params["sizes"][:output]) if along else 0),)

    def bind(
        self, node: Node, axis: int, size: int, operands: Sequence[Any], output: int = 0
    ) -> Any:
        if node.params["axis"] == axis:  # cut where the positions were chosen
            return operands[0]
        return lax.split(operands[0], node.params["sizes"], node.params["axis"])[output]


@register_axis_rule(_compat.optimization_barrier_p)
class _OptimizationBarrier(AxisRule):
    def operands(self, node: Node, axis: int, output: int = 0) -> tuple[Operand, ...]:
        return tuple(Operand(axis if i == output else None) for i in range(len(node.ins)))

    def bind(
        self, node: Node, axis: int, size: int, operands: Sequence[Any], output: int = 0
    ) -> Any:
        return operands[output]  # it only orders the work that is no longer done


def _replaced(values: Sequence[int], axis: int, value: int) -> tuple[int, ...]:
    return (*values[:axis], value, *values[axis + 1 :])
