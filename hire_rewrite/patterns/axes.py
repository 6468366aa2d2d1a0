"""Operations that act separately on each position of an axis.

For such an operation, position `i` of an axis of its result depends only on position `i` of an
axis of each operand (or on some other position that the shapes tell, where it slices or reshapes).
An `AxisRule` says which positions of each operand belong to a `Window` of the result, and how to
run the operation when only some of them are kept. This is the whole knowledge of the matcher
about activations: whatever is built from registered operations may be computed neuron by neuron.

To teach the matcher a new operation, register a rule for its primitive:

    @register_axis_rule(my_primitive)
    class MyRule(AxisRule): ...
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jax.extend.core import primitives as p

from hire_rewrite.graph.evaluate import evaluate_part as rerun
from hire_rewrite.graph.nodes import Node, Value
from hire_rewrite.patterns.window import Window

__all__ = [
    "AxisRule",
    "Blocked",
    "axis_rules",
    "keeps_tokens",
    "register_axis_rule",
    "rerun",
    "result_axis",
]


class Blocked(Exception):  # noqa: N818 (a finding, not an error)
    """The operation mixes positions of the axis; the message completes "the axis ..."."""


class AxisRule:
    """The rule of elementwise operations; others override its methods."""

    def operands(self, node: Node, window: Window, output: int = 0) -> tuple[Window, ...]:
        """The windows of the operands that belong to one of a result; raises `Blocked`."""
        return tuple(_varying(window, v.shape, node.outs[output].shape) for v in node.ins)

    def bind(
        self, node: Node, window: Window, n: int, operands: Sequence[Any], output: int = 0
    ) -> Any:
        """A result in its window at `n` positions, from operands in theirs."""
        return rerun(node, operands)[output]


axis_rules: dict[Any, AxisRule] = {}


def register_axis_rule(*primitives: Any) -> Callable[[type[AxisRule]], type[AxisRule]]:
    """Class decorator: the rule for `primitives`."""

    def register(rule: type[AxisRule]) -> type[AxisRule]:
        axis_rules.update(dict.fromkeys(primitives, rule()))
        return rule

    return register


def result_axis(node: Node, position: int, axis: int, output: int = 0) -> tuple[int, int] | None:
    """The axis of a result that belongs to an axis of an operand, or None.

    Returns:
      The axis, and the position of the operand that its position 0 comes from: it may be a slice.
    """
    rule = axis_rules.get(node.primitive)
    if rule is None:
        return None
    size = node.ins[position].shape[axis]
    for candidate, extent in enumerate(node.outs[output].shape):
        if extent > size:
            continue
        try:
            window = rule.operands(node, Window(candidate, extent), output)[position]
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
    fixed = {inner.axis, *inner.picked}
    rest = [i for i in node.params["permutation"] if i not in fixed and old[i] > 1]
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


def _varying(window: Window, old: Sequence[int], new: Sequence[int]) -> Window:
    """The window of an operand of the result's rank, or one that is the same everywhere."""
    if len(old) != len(new):
        return Window(None)
    axis = window.axis if window.axis is not None and old[window.axis] == new[window.axis] else None
    return window.with_axis(axis).with_picks([(i, j) for i, j in window.picks if old[i] == new[i]])
