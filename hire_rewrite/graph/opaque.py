"""Equations that nobody looks into, and that may hold a product."""

from __future__ import annotations

from typing import Any

from jax.extend.core import primitives as p

from hire_rewrite import _compat
from hire_rewrite.graph.flatten import inner_jaxprs
from hire_rewrite.graph.nodes import Node
from hire_rewrite.graph.provenance import Provenance

_PRODUCTS = {p.dot_general_p, p.conv_general_dilated_p, _compat.ragged_dot_general_p}
_ORDINARY = frozenset(
    {value for name, value in vars(p).items() if name.endswith("_p")}
    | {_compat.split_p, _compat.unstack_p, _compat.stack_p, _compat.optimization_barrier_p}
    | {_compat.ragged_dot_general_p, *_compat.sharding_casts, *_compat.exchanges}
)
_PROGRAMS = frozenset({"call_exported", "pure_callback", "io_callback"})
"""What runs a program that may have weights of its own."""


def may_hide_product(node: Node, provenance: Provenance) -> bool:
    """Whether an equation holds a product out of sight, or may do so for all that JAX tells.

    A kernel, or a call of a new kind, is suspected where it reads a matrix that depends on weights
    alone, and something else; a `Ref` where it is an argument that holds weights.
    """
    if node.bodies:
        return False
    if node.primitive is p.get_p:
        ref = node.ins[0]
        return ref.is_input and provenance.is_weight(ref) and len(ref.shape) > 1
    if node.primitive in _ORDINARY or _holds_product(node.eqn):
        return _holds_product(node.eqn)
    if node.primitive.name in _PROGRAMS:
        return any(value.shape for value in node.outs)
    matrices = [v for v in node.ins if provenance.is_weight(v) and len(v.shape) > 1]
    return bool(matrices) and not all(map(provenance.is_weight, node.ins))


def opaque_name(node: Node) -> str:
    """What a user knows an equation by: its primitive, and the kernel or function that it calls."""
    params = _compat.call_params(node.eqn)
    fun = getattr(params.get("exported"), "fun_name", None)
    name = fun or params.get("target_name") or params.get("name")
    if _compat.is_high_call(node.eqn):
        name = type(node.params["_prim"]).__name__
    return f"{node.primitive} {name}" if name else str(node.primitive)


def _holds_product(eqn: Any) -> bool:
    stack = inner_jaxprs(eqn)
    while stack:
        jaxpr, _ = _compat.open_jaxpr(stack.pop())
        for inner in jaxpr.eqns:
            if inner.primitive in _PRODUCTS or inner.primitive.name == "call_exported":
                return True
            stack += inner_jaxprs(inner)
    return False
