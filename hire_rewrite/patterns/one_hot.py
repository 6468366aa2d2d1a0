"""Products with one-hot rows: a choice, written as a sum."""

from __future__ import annotations

from jax.extend.core import primitives as p

from hire_rewrite.graph.nodes import Node, Value
from hire_rewrite.graph.traits import Trait, has


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


def chooses(node: Node) -> int | None:
    """The operand of a product that a one-hot other one chooses from, or None."""
    if node.primitive is not p.dot_general_p:
        return None
    return next((i for i in (0, 1) if is_one_hot(node.ins[1 - i])), None)


def free_axes(product: Node, position: int) -> dict[int, int]:
    """The axes of an operand that a `dot_general` neither contracts nor shares, to the result's."""
    contracting, batch = product.params["dimension_numbers"]
    frees = [
        [i for i in range(len(v.shape)) if i not in contracting[s] and i not in batch[s]]
        for s, v in enumerate(product.ins)
    ]
    first = len(batch[0]) + (len(frees[0]) if position == 1 else 0)
    return {axis: first + i for i, axis in enumerate(frees[position])}
