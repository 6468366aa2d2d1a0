"""Numbers along the vocabulary: whether they differ, count up, or were drawn."""

from __future__ import annotations

import jax.numpy as jnp
from jax.extend.core import primitives as p

from hire_rewrite.graph.nodes import Node, Value
from hire_rewrite.graph.reach import reached
from hire_rewrite.graph.sources import backward_slice, body_of
from hire_rewrite.graph.traits import Trait, has
from hire_rewrite.patterns.axes import origin


def varies(value: Value, axis: int, depth: int = 16) -> bool:
    """Whether numbers may differ along an axis."""
    if value.literal is not None or axis >= len(value.shape) or value.shape[axis] == 1:
        return False
    if value.is_input and value.scope.parent is not None:
        body, i = body_of(value)
        sliced = body.inputs[i].role == "slice"
        return body.inputs[i].role == "carry" or varies(body.inputs[i].outer, axis + sliced, depth)
    node = value.node
    if node is None or node.bodies or depth == 0:
        return True
    if node.primitive is p.broadcast_in_dim_p:
        places = list(node.params["broadcast_dimensions"])
        return axis in places and varies(node.ins[0], places.index(axis), depth - 1)
    if node.primitive is p.iota_p:
        return bool(node.params["dimension"] == axis)
    if has(node.primitive, Trait.POINTWISE):
        return any(varies(operand, axis, depth - 1) for operand in node.ins)
    return True


def counts_up(value: Value, axis: int) -> bool:
    """Whether a value is the numbers 0, 1, 2, … along an axis: each is there once."""
    while value.node is not None:
        node = value.node
        if node.primitive is p.iota_p:
            return bool(node.params["dimension"] == axis)
        if node.primitive is p.broadcast_in_dim_p:
            places = list(node.params["broadcast_dimensions"])
            if axis not in places:
                return False
            value, axis = node.ins[0], places.index(axis)
        elif has(node.primitive, Trait.CASTS):
            value = node.ins[0]
        else:
            return False
    return False


def is_random(value: Value) -> bool:
    """Whether it is random numbers of a continuous range, each drawn for its place, and nothing
    that a model computes: what is drawn is drawn by guesses, too. Integers, those that are zero or
    one, and what is written to places that are drawn are masks."""
    made = [each.node for each in backward_slice(value)]
    drawn = any(node is not None and has(node.primitive, Trait.RANDOM) for node in made)
    if not drawn or any(n is not None and has(n.primitive, Trait.MULTIPLIES) for n in made):
        return False

    def behind(value: Value) -> tuple[Value, ...]:
        node = value.node
        return () if node is None or has(node.primitive, Trait.RANDOM) else node.ins

    after = (each.node for each in reached([value], behind))
    return not any(
        _width(node.outs[0]) == _width(value) and _is_of_a_mask(node)
        for node in after
        if node is not None and not has(node.primitive, Trait.RANDOM)
    )


def _is_of_a_mask(node: Node) -> bool:
    if has(node.primitive, Trait.COMPARES | Trait.SCATTERS | Trait.ORDERS):
        return True
    before, after = node.ins[0].aval, node.outs[0].dtype
    return (
        has(node.primitive, Trait.CASTS)
        and jnp.issubdtype(after, jnp.floating)
        and not jnp.issubdtype(before.dtype, jnp.floating)
    )


def is_above_zero(value: Value) -> bool:
    """Whether random numbers are seen to be above zero: of an exponential distribution, say."""
    node = origin(value, Trait.CASTS | Trait.MOVES | Trait.KEEPS).node
    if node is None or node.primitive is p.exp_p:
        return node is not None
    inner = origin(node.ins[0], Trait.CASTS | Trait.MOVES | Trait.KEEPS).node
    logs = (p.log_p, p.log1p_p)
    return node.primitive is p.neg_p and inner is not None and inner.primitive in logs


def _width(value: Value) -> int:
    return max((size for size in value.shape if isinstance(size, int)), default=1)
