"""Which linear layers in no site came close to one, so that what stopped the match helps a user."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping

from jax.extend.core import primitives as p

from hire_rewrite.graph.nodes import Node
from hire_rewrite.graph.trace import Trace
from hire_rewrite.graph.traits import Trait, has
from hire_rewrite.patterns.linear import Linear, as_linear
from hire_rewrite.patterns.refusal import NoMatch, Refusal

_NEAR = 64
"""Operations that may stand between two layers of a block."""

_ALWAYS = (Refusal.UNSUPPORTED, Refusal.TAKEN, Refusal.NOT_A_BLOCK)
"""Forms of sites that are known but not rewritten, and two layers with an activation between."""


def near_misses(trace: Trace, refused: Mapping[Node, NoMatch]) -> frozenset[Node]:
    """The refused layers whose reason helps.

    These are layers that look like a vocabulary (used as one and wide enough, or the last product
    that widens), layers that look like the two of a block, and what is no plain product.
    """
    near = set()
    for node, refusal in refused.items():
        linear = _layer(trace, node)
        vocabulary = refusal.intended and refusal.refusal is not Refusal.TOO_NARROW
        if linear is None or vocabulary or refusal.refusal in _ALWAYS:
            near.add(node)
            continue
        if linear.out_dim <= linear.in_dim:
            continue
        behind = list(products_behind(trace, node))
        ends = {user for user in behind if _ends_block(trace, linear, user)}
        if ends or not behind:
            near |= {node} | ends
    for node in refused.keys() - near:
        if _behind_argument(trace, node):
            near.add(node)
    return frozenset(near & refused.keys())


def layer_behind(trace: Trace, node: Node, refused: Mapping[Node, NoMatch]) -> Node | None:
    """The refused layer that contracts what a layer returns, where nothing but other operations
    stands between."""
    first = _layer(trace, node)
    if first is None:
        return None
    for user in products_behind(trace, node):
        if user in refused and _ends_block(trace, first, user):
            return user
    return None


def products_behind(trace: Trace, node: Node) -> Iterator[Node]:
    """The products, loops and branches that read what a node returns, with other operations in
    between."""
    queue, seen = [node], {node}
    while queue and len(seen) < _NEAR:
        for result in queue.pop(0).outs:
            for user, _ in trace.live.users(result):
                if user in seen:
                    continue
                seen.add(user)
                if has(user.primitive, Trait.MULTIPLIES) or user.bodies:
                    yield user
                else:
                    queue.append(user)


def _layer(trace: Trace, node: Node) -> Linear | None:
    with contextlib.suppress(NoMatch):
        return as_linear(node, trace.provenance)
    return None


def _ends_block(trace: Trace, first: Linear, node: Node) -> bool:
    second = _layer(trace, node)
    return second is not None and second.in_dim == first.out_dim


def _behind_argument(trace: Trace, node: Node) -> bool:
    """Whether a layer reads, with other operations in between, what a product with something that
    is not a weight widened: a block whose first layer is an argument of its own."""
    linear = _layer(trace, node)
    if linear is None:
        return False
    queue, seen = [linear.x.node], {node}
    while queue and len(seen) < _NEAR:
        here = queue.pop(0)
        if here is None or here in seen or here.bodies:
            continue
        seen.add(here)
        if not has(here.primitive, Trait.MULTIPLIES):
            queue += [value.node for value in here.ins]
        elif _widens(here, linear.in_dim) and _layer(trace, here) is None:
            return True
    return False


def _widens(node: Node, width: int) -> bool:
    """Whether a product makes this many numbers of fewer."""
    if node.primitive is not p.dot_general_p:
        return False
    (contracted, _), (batch, _) = node.params["dimension_numbers"]
    taken = math.prod(node.ins[0].shape[axis] for axis in contracted)
    return not batch and node.outs[0].shape[-1] == width and taken < width
