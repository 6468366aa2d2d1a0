"""What a weights argument holds that is not a weight: caches, positions and random keys.

A library that keeps a model's state in the model hands it over with the weights. Packed, it stays
as it is: each call begins with the values that it had then, and what the call makes of them is
dropped. The jaxpr tells so where the state is written to, counts, or is a key of random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import jax.numpy as jnp
from jax.extend.core import primitives as p

from hire_rewrite.graph.nodes import Node, Scope, Value, source_of
from hire_rewrite.graph.reach import reached
from hire_rewrite.graph.trace import Trace
from hire_rewrite.graph.traits import Trait, has
from hire_rewrite.names import first_names

_ALIASES = Trait.KEEPS | Trait.CASTS | Trait.MOVES | Trait.CUTS
_COUNTS = Trait.POINTWISE | Trait.MOVES | Trait.CUTS | Trait.EXTENDS


def state_among_weights(trace: Trace) -> str | None:
    """What weights arguments hold that a call writes to, counts with, or draws random numbers by.

    Returns:
      A sentence for a user; None if there is nothing like that.
    """
    found: dict[str, tuple[str, Node]] = {}
    for i in trace.weights:
        signs = _signs(trace, trace.scope.inputs[i])
        if (sign := next(signs, None)) is not None:
            found[trace.paths[i]] = sign
    if not found:
        return None
    some = first_names(list(found))
    what, node = next(iter(found.values()))
    return (
        f"{some} among the weights {'looks' if len(found) == 1 else 'look'} like state, not like "
        f"weights: this call {what} ({source_of(node)}). Packed, state stays as it is, "
        "and each call begins with it anew: pass it as an argument of its own and return what "
        "becomes of it (Flax NNX: nnx.split(model, nnx.Param, ...); others: docs/guide/models.md)"
    )


def _signs(trace: Trace, leaf: Value) -> Iterator[tuple[str, Node]]:
    """What is done to an array that is not done to weights, and where."""
    for value in _derived(leaf, _ALIASES):
        for node, place in value.users:
            if place == 0 and _written(node) and not trace.provenance.is_weight(node.outs[0]):
                yield "writes there", node
            if place == 0 and node.primitive.name in _KEYED and node in trace.live.nodes:
                yield "draws random numbers by a key there, the same each time", node
    if not jnp.issubdtype(leaf.dtype, jnp.integer) or leaf.shape[1:]:
        return
    scalar = leaf.shape in ((), (1,))
    for value in _derived(leaf, _ALIASES):
        if math.prod(value.shape) == 1:
            yield from (("counts there", node) for node, _ in value.users if _counts(trace, node))
    for value in _derived(leaf, _COUNTS):
        for node, place in value.users:
            if not _indexes(node, place):
                continue
            if _written(node) and not trace.provenance.is_weight(node.outs[0]) and _small(value):
                yield "writes to a place that a number there says", node
            elif scalar and not _written(node):
                yield "reads at a place that a number there says", node


_KEYED = ("random_bits", "random_split", "random_fold_in", "random_wrap", "threefry2x32")
"""Primitives whose first operand is a key of random numbers."""


def _derived(leaf: Value, traits: Trait) -> list[Value]:
    """An input, and what is made of it by primitives with these traits.

    Loops that carry it are not entered: they begin with it at each call, as they should.
    """

    def behind(value: Value) -> Iterator[Value]:
        for node, place in value.users:
            if node.bodies:
                yield from _inside(node, value)
            elif has(node.primitive, traits) and (place == 0 or traits & Trait.POINTWISE):
                yield from (out for out in node.outs if _whole(out, leaf, traits))

    return list(reached([leaf], behind))


def _whole(out: Value, leaf: Value, traits: Trait) -> bool:
    """Whether a result may count as the array, or as a number that is made of it."""
    if traits & Trait.POINTWISE:  # numbers that say a place
        return jnp.issubdtype(out.dtype, jnp.integer) and (_small(out) or out.shape == leaf.shape)
    return math.prod(out.shape) <= math.prod(leaf.shape)


def _small(value: Value) -> bool:
    """Whether it can be the place in an array, which has a number for each axis."""
    return len(value.shape) < 2 and math.prod(value.shape) <= 8


def _inside(node: Node, value: Value) -> list[Value]:
    """A value in the bodies of a loop or a branch that it goes into, unless it changes there."""
    return [
        inner
        for body in node.bodies
        for inner, link in zip(body.scope.inputs, body.inputs, strict=True)
        if link.outer is value and link.role != "carry"
    ]


def _written(node: Node) -> bool:
    return node.primitive is p.dynamic_update_slice_p or has(node.primitive, Trait.SCATTERS)


def _indexes(node: Node, place: int) -> bool:
    """Whether an operand says where to read or to write."""
    if node.primitive is p.dynamic_update_slice_p:
        return place >= 2
    if node.primitive is p.dynamic_slice_p:
        return place >= 1
    return place == 1 and (node.primitive is p.gather_p or _written(node))


def _counts(trace: Trace, node: Node) -> bool:
    """Whether a sum with a number is dropped, or returned."""
    if not has(node.primitive, Trait.ADDS) or all(value.literal is None for value in node.ins):
        return False
    out = node.outs[0]
    if out.users:
        return False
    scope: Scope = node.scope
    return out in trace.scope.outputs or out not in scope.outputs
