"""Logits that are looked up: whether something is decided by comparing them with each other.

The answers A to D, or yes and no: those that are looked up may be none of the greatest, and
guesses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp

from hire_rewrite.graph.nodes import Node, Uses, Value
from hire_rewrite.graph.traits import Trait, has

_MOST = 64
"""Values that are looked at behind a lookup."""


def picks(gather: Node, logits: Value, axis: int) -> int:
    """How many logits a gather looks up for each token."""
    sizes = list(gather.outs[0].shape)
    for i, size in enumerate(logits.shape):
        if i != axis and size in sizes:
            sizes.remove(size)
    return math.prod(sizes)


def are_ranked(looked_up: Value, uses: Uses) -> bool:
    """Whether several logits that were looked up at once are soon ranked."""
    return any(
        _is_read_by(value, Trait.SEARCHES | Trait.ORDERS, uses) for value in soon(looked_up, uses)
    )


def compared_lookups(singles: Sequence[Value], uses: Uses) -> Node | None:
    """Where logits that were looked up one by one meet, if that decides something; or None."""
    groups = [soon(single, uses) for single in singles]
    before: set[Value] = set()
    for group in groups:
        for value in group:
            for user, position in uses.users(value):
                others = {other for i, other in enumerate(user.ins) if i != position}
                if before & others - set(group) and _decides(user, uses):
                    return user
        before.update(group)
    return None


def _decides(node: Node, uses: Uses) -> bool:
    """Whether something is decided by what an operation returns."""
    deciding = Trait.COMPARES | Trait.SEARCHES | Trait.ORDERS
    behind = (value for out in node.outs for value in soon(out, uses))
    return has(node.primitive, Trait.COMPARES) or any(
        _is_read_by(value, deciding, uses) for value in behind
    )


def _is_read_by(value: Value, traits: Trait, uses: Uses) -> bool:
    return any(has(user.primitive, traits) for user, _ in uses.users(value))


def soon(value: Value, uses: Uses, until: Trait = Trait.REDUCES) -> list[Value]:
    """Numbers, and what is made of them next in their scope, up to operations of some traits."""
    seen = [value]
    for current in seen:
        for user, _ in uses.users(current):
            if len(seen) < _MOST and not user.bodies and not has(user.primitive, until):
                numbers = (out for out in user.outs if jnp.issubdtype(out.dtype, jnp.floating))
                seen += [out for out in numbers if out not in seen]
    return seen
