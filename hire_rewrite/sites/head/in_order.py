"""What is read of logits that were put in order: how far down, or at a rank that nobody knows.

Who sorts all of them reads a few of the greatest as a rule, and as many are exact. Which token has
the k-th rank for a k that is given at the call, which rank a token has, or what else is known of
the tokens in their order, may be told by guesses. (What becomes of the numbers otherwise is
followed as that of all logits is: see `order`.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives as p

from hire_rewrite.graph.nodes import Node, Uses, Value
from hire_rewrite.graph.reach import reached
from hire_rewrite.graph.traits import Trait, has
from hire_rewrite.patterns.axes import result_axis
from hire_rewrite.sites.head.along import counts_up, is_random
from hire_rewrite.sites.head.distortion import constant_of
from hire_rewrite.sites.head.flow import in_bodies
from hire_rewrite.sites.head.followed import Followed
from hire_rewrite.sites.head.looked_up import index_along
from hire_rewrite.sites.head.ways import DOWN


class Part(NamedTuple):
    """A value that holds a part of numbers in ascending order, from start to limit of size; and
    whether it holds tokens, and not the numbers alone."""

    value: Value
    start: int
    limit: int
    size: int
    tokens: bool


class _Sorted(NamedTuple):
    """A value made of what a sort returns, along an axis.

    Attributes:
      turned: whether the last comes first.
      places: whether it holds tokens, and not their logits; or their ranks.
      ranks: whether it is in the order of the tokens again, and holds ranks.
    """

    value: Value
    axis: int
    turned: bool = False
    places: bool = False
    ranks: bool = False


class InOrder:
    """What is read of the results of a sort.

    Args:
      order: what is known behind the head.
      sort: a node.
      axis: along which it sorts.
      way: how what it sorts is ordered along that.

    Attributes:
      parts: that are cut out.
      looked_up: logits at ranks that nobody knows before.
      ranks: of all tokens, and whether the least number has the greatest.
      masks: conditions about ranks, where the tokens are.
      unknown: an operation that reads tokens at ranks that the logits do not say, or the ranks of
        such tokens, or something else of each token in order; None if there is none.
    """

    def __init__(self, order: Followed, sort: Node, axis: int, way: int) -> None:
        self.parts: list[Part] = []
        self.looked_up: list[Value] = []
        self.ranks: list[tuple[Value, int, bool]] = []
        self.masks: list[Value] = []
        self.unknown: Node | None = None
        self._order, self._of_logits = order, order.of_logits
        outs = [_Sorted(out, axis, places=_is_whole(out)) for out in sort.outs]
        for here in reached(outs, self._all_behind):
            if self.unknown is not None:
                break
            if here.places and here.value in order.uses.results:
                self.unknown = here.value.node
            if not here.places:
                order.greatest_first[here.value] = (way == DOWN) != here.turned

    def _all_behind(self, here: _Sorted) -> Iterator[_Sorted]:
        for user, position in self._order.uses.users(here.value):
            yield from self._behind(here, user, position)

    def _behind(self, here: _Sorted, user: Node, position: int) -> list[_Sorted]:
        """What an operation makes of it, as far as that is followed."""
        value, axis = here.value, here.axis
        primitive = user.primitive
        if primitive is p.rev_p and axis in user.params["dimensions"]:
            return [here._replace(value=user.outs[0], turned=not here.turned)]
        if primitive is p.slice_p and user.outs[0].shape[axis] == value.shape[axis]:
            return [here._replace(value=user.outs[0])]
        if primitive is p.slice_p:
            starts, limits = user.params["start_indices"], user.params["limit_indices"]
            self._read(here, starts[axis], limits[axis], user)
            return []
        if primitive is p.cond_p:
            return [here._replace(value=inner) for inner in in_bodies(user, value)]
        if primitive is p.gather_p or primitive is p.dynamic_slice_p:
            return self._looked_up(here, user, position)
        if user.bodies or has(primitive, Trait.CUTS):
            self.unknown = user  # nobody reads them in order in a loop, or cuts them to pieces
        elif has(primitive, Trait.SCATTERS) and position == 2 and here.places:
            self.unknown = user
        elif has(primitive, Trait.POINTWISE | Trait.MOVES | Trait.KEEPS) and (
            not here.places or not has(primitive, Trait.COMPARES)
        ):
            return self._along(here, user, position)
        elif here.places:
            return self._behind_places(here, user, position)
        return []

    def _behind_places(self, here: _Sorted, user: Node, position: int) -> list[_Sorted]:
        """What is made of tokens in order, or of ranks."""
        primitive = user.primitive
        if has(primitive, Trait.SCATTERS):
            return self._written(here, user) if position == 1 else []
        if has(primitive, Trait.ORDERS):
            whole = [out for out in user.outs if _is_whole(out)]
            self.ranks += ((out, here.axis, here.turned) for out in whole)
            return [_Sorted(out, here.axis, places=True, ranks=True) for out in whole]
        if has(primitive, Trait.COMPARES):
            other = user.ins[1 - position]
            equal = primitive in (p.eq_p, p.ne_p)
            if here.ranks and not equal:
                self.masks += user.outs
            elif other not in self._of_logits and not _counts_from_the_end(
                user, here.value, self._order.uses
            ):
                self.unknown = user
        elif has(primitive, Trait.REDUCES):
            self.unknown = user
        elif has(primitive, Trait.EXTENDS):
            alike = len(user.outs[0].shape) == len(here.value.shape)
            return [here._replace(value=out) for out in user.outs if alike]
        return []

    def _written(self, here: _Sorted, user: Node) -> list[_Sorted]:
        """What is written to where the tokens are: their ranks, conditions, or their numbers (which
        `order` follows)."""
        (out,), size = user.outs, here.value.shape[here.axis]
        axis = max((i for i, extent in enumerate(out.shape) if extent == size), default=None)
        updates = user.ins[2]
        if axis is None:
            self.unknown = user
        elif _is_whole(out):
            if counts_up(updates, min(here.axis, len(updates.shape) - 1)):
                self.ranks.append((out, axis, here.turned))
            return [_Sorted(out, axis, places=True, ranks=True)]
        elif out.dtype == jnp.bool_:
            self.masks.append(out)
        elif updates not in self._of_logits:
            self.unknown = user
        return []

    def _along(self, here: _Sorted, user: Node, position: int) -> list[_Sorted]:
        """What is made of each number by itself."""
        place = result_axis(user, position, here.axis)
        if place is None:
            return []
        numbers = [out for out in user.outs if out.dtype != jnp.bool_]
        return [here._replace(value=out, axis=place[0]) for out in numbers]

    def _looked_up(self, here: _Sorted, user: Node, position: int) -> list[_Sorted]:
        """Tokens, or ranks, at places that the logits say, or that are given; or something of the
        tokens in their order."""
        if position > 0:
            return self._by_tokens(here, user) if here.places else []
        place = result_axis(user, 0, here.axis)
        if place is not None and user.outs[0].shape[place[0]] == here.value.shape[here.axis]:
            return [here._replace(value=user.outs[0], axis=place[0])]  # of some rows all
        index, size = index_along(user, here.axis), here.value.shape[here.axis]
        back = not here.places and size in user.outs[0].shape
        if self._order.says_which(index, size) or (back and self._order.ranks.make(index)):
            return []
        constant = constant_of(index)
        if constant is None or here.ranks or np.size(constant) != 1:
            if here.places:
                self.unknown = user
            else:
                self.looked_up += user.outs
            return []
        start = int(np.asarray(constant).reshape(()))
        self._read(here, start, start + 1, user)
        return []

    def _by_tokens(self, here: _Sorted, user: Node) -> list[_Sorted]:
        """What is looked up for each token in order."""
        table, (out,) = user.ins[0], user.outs
        kept = [i for i in range(len(out.shape)) if i not in user.params["dimension_numbers"][0]]
        if here.axis >= len(kept) or (table not in self._of_logits and not is_random(table)):
            self.unknown = user
            return []
        behind = _Sorted(out, kept[here.axis], here.turned)
        if _is_whole(out):
            return [behind._replace(places=True, ranks=True)]
        if out.dtype == jnp.bool_:
            self.masks.append(out)
            return []
        return [behind] if table in self._of_logits else []

    def _read(self, here: _Sorted, start: int, limit: int, user: Node) -> None:
        size = here.value.shape[here.axis]
        if here.ranks:
            self.unknown = user
            return
        if here.turned:
            start, limit = size - limit, size - start
        self.parts.append(Part(user.outs[0], start, limit, size, here.places))


def _is_whole(value: Value) -> bool:
    return bool(jnp.issubdtype(value.dtype, jnp.integer))


def _counts_from_the_end(comparison: Node, index: Value, uses: Uses) -> bool:
    """Whether it asks which indices are negative, to count those from the end."""
    number = constant_of(comparison.ins[1])
    if comparison.primitive is not p.lt_p or number is None or np.ndim(number) or int(number):
        return False
    users = [user for user, _ in uses.users(comparison.outs[0])]
    return all(user.primitive is p.select_n_p and index in user.ins[1:] for user in users)
