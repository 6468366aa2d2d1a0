"""Logits that are looked up, or added up: whether something is decided by what they are.

The answers A to D, yes and no, the likeliest of several texts: those that are looked up may be none
of the greatest, and guesses.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives as p

from hire_rewrite.graph.effects import touches
from hire_rewrite.graph.nodes import Node, Uses, Value
from hire_rewrite.graph.reach import reached
from hire_rewrite.graph.traits import Trait, has
from hire_rewrite.patterns.axes import origin
from hire_rewrite.sites.head.along import counts_up, is_random
from hire_rewrite.sites.head.distortion import constant_of
from hire_rewrite.sites.head.flow import in_bodies, leave, made_from

_DECISIONS = (p.argmin_p, p.sign_p, p.round_p, p.floor_p, p.ceil_p)
_SAME_INDEX = Trait.MOVES | Trait.CASTS | Trait.KEEPS | Trait.CUTS


def index_along(lookup: Node, axis: int) -> Value:
    """What says where a `gather`, a `dynamic_slice` or a product with one-hot rows looks along an
    axis of its first operand (of a product the other operand)."""
    if lookup.primitive is p.dynamic_slice_p:
        return lookup.ins[1 + axis]
    index = lookup.ins[1]
    if lookup.primitive is not p.gather_p:
        return index
    places = lookup.params["dimension_numbers"].start_index_map
    joined = origin(index, Trait.CASTS | Trait.KEEPS).node
    if len(places) == 1 or axis not in places or joined is None:
        return index
    parts = joined.ins
    alone = joined.primitive is p.concatenate_p and len(parts) == len(places)
    last = joined.params.get("dimension") == len(index.shape) - 1
    return parts[places.index(axis)] if alone and last else index


def says_which(
    index: Value, of_logits: Collection[Value], size: int, searches: Callable[[Node], bool]
) -> bool:
    """Whether an index is where the greatest logits are, or one that was drawn, and nothing that is
    made of that, or chosen from that and others.

    Args:
      of_logits: the values that depend on the logits.
      size: of the vocabulary.
      searches: whether a search or a sort is one along the vocabulary.
    """

    def made_of(value: Value) -> Sequence[Value]:
        """The indices that an index is; none if it is a place of a search, or not known."""
        node = value.node
        if node is None or node.bodies:
            return made_from(value)
        if node.primitive is p.select_n_p:  # of which a negative one counts from the end
            cases = [origin(case, Trait.CASTS) for case in node.ins[1:]]
            return [c for c in cases if not _is_counted_from_the_end(c, cases)]
        if has(node.primitive, _SAME_INDEX) or node.primitive in (p.rev_p, p.gather_p):
            return node.ins[:1]  # looked up: of the logits, and no table
        if node.primitive is p.concatenate_p:
            return node.ins
        if node.primitive in (p.clamp_p, p.min_p, p.max_p):
            return [v for v in node.ins if not _is_bound(v, size)]
        if node.primitive is p.eq_p:  # a row that is one at one place
            return [v for v in node.ins if v in of_logits]
        return ()

    def says(value: Value) -> bool:
        node = value.node
        if value not in of_logits:
            return False
        if node is not None and has(node.primitive, Trait.SEARCHES | Trait.ORDERS):
            return _is_place(node, value) and searches(node)
        return node is None or bool(node.bodies) or bool(made_of(value))

    return all(map(says, reached([index], made_of)))


def _is_place(search: Node, value: Value) -> bool:
    """Whether a result of a search or a sort says where numbers were, and is none of them."""
    if search.primitive is not p.sort_p:
        return value is search.outs[-1]
    key, places = search.ins[0].node, search.ins[search.outs.index(value)]
    turned = places.node if places.node is not None and places.node.primitive is p.rev_p else None
    if turned is not None and key is not None and key.primitive is p.rev_p:  # both, to sort down
        places = turned.ins[0]
    return counts_up(places, search.params["dimension"])


def _is_bound(value: Value, size: int) -> bool:
    """Whether it is a bound that no place meets."""
    number = constant_of(value)
    if number is None or np.ndim(number):
        return False
    return int(number) <= 0 or int(number) >= size - 1


def _is_counted_from_the_end(case: Value, others: Collection[Value]) -> bool:
    made = case.node
    if made is None or made.primitive is not p.add_p:
        return False
    return any(origin(operand, Trait.CASTS) in others for operand in made.ins)


def decided_by(
    numbers: Collection[Value], vocabulary: Collection[Value], uses: Uses
) -> Node | None:
    """Where something is decided by some numbers, or by what is made of them anywhere: they are
    compared, ranked, rounded to an integer, or written to a `Ref`; or None.

    Who asks whether they are numbers at all, compares them with random ones, or all logits with
    them, decides nothing that is not judged by how it treats these.

    Args:
      vocabulary: values along the vocabulary, in which they may be a part of all numbers alike:
        which of these are the greatest they do not say, but how great these are.
    """
    unclear = next((value for value in numbers if not _is_number(value)), None)
    if unclear is not None:
        return unclear.node

    def behind(value: Value) -> Iterator[Value]:
        if value in uses.results:
            yield from (there for there, _ in leave(value, 0))
        for user, _ in uses.users(value):
            if user.bodies:
                yield from in_bodies(user, value)
            elif value in vocabulary:
                yield from filter(_is_number, user.outs)
            elif not has(user.primitive, Trait.COMPARES) and user.primitive is not p.is_finite_p:
                yield from user.outs

    for value in reached(numbers, behind):
        for user, position in uses.users(value):
            if _decides(user, position, vocabulary):
                return user
    return None


def _is_number(value: Value) -> bool:
    return not hasattr(value.aval, "dtype") or jnp.issubdtype(value.dtype, jnp.floating)


def _decides(user: Node, position: int, vocabulary: Collection[Value]) -> bool:
    """Whether an operation decides something by a number, or keeps it for later."""
    value = user.ins[position]
    if any(written for ref, written in touches(user).items() if ref is not None):
        return True
    if user.bodies or value in vocabulary or user.primitive is p.is_finite_p:
        return False
    if has(user.primitive, Trait.SEARCHES | Trait.ORDERS) or user.primitive in _DECISIONS:
        return True
    if has(user.primitive, Trait.COMPARES):
        return _compares(user, position, vocabulary)
    return jnp.issubdtype(value.dtype, jnp.floating) and not all(map(_is_number, user.outs))


def _compares(comparison: Node, position: int, vocabulary: Collection[Value]) -> bool:
    one, other = comparison.ins[position], comparison.ins[1 - position]
    if origin(one, Trait.CASTS) is origin(other, Trait.CASTS) or is_random(other):
        return False
    if other in vocabulary:
        return False
    constant = constant_of(other)
    return constant is None or bool(np.isfinite(np.asarray(constant, np.float64)).any())
