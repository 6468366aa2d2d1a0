"""Where logits go: a wide axis is a vocabulary if all that happens to it is what happens to logits.

`follow` goes wherever the axis goes, through softmaxes, loops and branches, and demands that it
ends where logits end: in a reduction, an arg max, a top-k, a lookup, or the function's results.
If it is contracted with something or cut to pieces, it was no vocabulary.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
from jax.extend.core import primitives as p

from hire_rewrite import _compat
from hire_rewrite.graph.nodes import Node, Uses, Value
from hire_rewrite.patterns.axes import axis_rules, result_axis
from hire_rewrite.patterns.miss import Contracted, Miss
from hire_rewrite.patterns.one_hot import free_axes, is_one_hot

__all__ = ["Search", "follow"]

Track = tuple[Value, int, bool]
"""A value, its vocabulary axis, and whether that is only a part of the vocabulary."""

_SINKS = frozenset(
    {p.argmax_p, p.reduce_max_p, p.reduce_min_p, p.reduce_sum_p, p.reduce_or_p}
    | {p.reduce_and_p, p.top_k_p, p.approx_top_k_p, p.sort_p, p.cumsum_p, p.cumlogsumexp_p}
    | {p.cummax_p, p.cumprod_p, p.cummin_p, p.reduce_prod_p, p.reduce_p}
)
"""Operations that consume logits if they run along the vocabulary."""

_VALUES = frozenset({p.top_k_p, p.approx_top_k_p})
"""Those that return some logits as they are, besides where they stood."""

_GREATEST = _VALUES | {p.argmax_p}

_STORES = frozenset(
    {p.scatter_p, p.scatter_add_p, p.scatter_mul_p, p.scatter_max_p, p.scatter_min_p}
)

_ALONG = frozenset({p.concatenate_p, p.pad_p, p.rev_p, p.dynamic_update_slice_p})
"""Operations that keep the axis where it is; they may make it longer, but cut nothing off."""


@dataclasses.dataclass(frozen=True, eq=False)
class Search:
    """An operation that looks for the greatest of all logits, by their values.

    `gather` is the `all_gather` in front of it, where each device of a `shard_map` has some.
    """

    node: Node
    gather: Node | None = None


def follow(origin: Node, axis: int, uses: Uses) -> tuple[Search, ...]:
    """Where the greatest of all along an axis of a node's result are looked for.

    Raises:
      Miss: the axis does not end where logits end.
    """
    seen: set[Track] = set()
    searches: dict[Node, Search] = {}
    gathers: dict[Value, Node] = {}
    width = origin.outs[0].shape[axis]
    stack: list[Track] = [(origin.outs[0], axis, False)]
    parted: Miss | None = None
    whole = False
    while stack:
        track = stack.pop()
        if track in seen:
            continue
        seen.add(track)
        value, axis, part = track
        if value in uses.results:
            if part:
                raise Miss("a part of the wide axis is a result: no vocabulary", origin, len(seen))
            whole = True
            stack += ((*there, part) for there in _leave(value, axis))
        for user, position in uses.users(value):
            if user.bodies:
                stack += ((*there, part) for there in _enter(user, value, axis))
                continue
            found = _pass(user, position, axis, len(seen), uses)
            whole = whole or (not found and not part)
            if not found and user.primitive in _VALUES and value.shape[axis] == width:
                searches[user] = Search(user)
            elif not found and user.primitive in _GREATEST and value in gathers:
                searches[user] = Search(user, gathers[value])
            if value.shape[axis] == width and _gathers(user, axis):
                gathers[user.outs[0]] = user
            for out, there in found:
                if out.shape[there] == 1 < value.shape[axis]:
                    whole = True  # a single logit was looked up
                    continue
                cut = 2 * out.shape[there] <= value.shape[axis]
                if cut:
                    parted = Miss(f"{user.primitive} cuts or mixes the wide axis", user, len(seen))
                stack.append((out, there, part or cut))
    if parted is not None and not whole:
        raise parted
    return tuple(searches.values())


def _pass(
    user: Node, position: int, axis: int, matched: int, uses: Uses
) -> list[tuple[Value, int]]:
    """Where the axis goes on behind one operation; nowhere if it is consumed there."""
    primitive = user.primitive
    found: list[tuple[Value, int]] = []
    if primitive is p.dot_general_p:
        batch = user.params["dimension_numbers"][1]
        free = free_axes(user, position)
        if axis in free:
            return [(user.outs[0], free[axis])]
        if axis in batch[position] or not is_one_hot(user.ins[1 - position]):
            reason = "the wide axis takes part in another product: no vocabulary"
            raise Contracted(reason, user, matched)
        return []
    if primitive in _SINKS:
        found = _reduced(user, axis)
        if not found and primitive in _VALUES and _is_multiplied(user.outs[0], uses):
            raise Contracted("what is looked up in it is multiplied: no vocabulary", user, matched)
        return found
    if primitive in _STORES:
        return _stored(user, position, axis, matched)
    if primitive is p.gather_p:
        found = _gathered(user, position, axis)
        if not found and _is_multiplied(user.outs[0], uses):
            raise Contracted("what is looked up in it is multiplied: no vocabulary", user, matched)
        return found
    if primitive in _compat.reductions:
        raise Miss(f"{primitive} joins the logits of several devices: they are parts of sums", user)
    if primitive is p.all_gather_p:
        added = not user.params["tiled"] and user.params["all_gather_dimension"] <= axis
        return [(user.outs[0], axis + added)]
    if primitive in _ALONG and len(user.outs[0].shape) == len(user.ins[position].shape):
        return [(out, axis) for out in user.outs]
    if primitive is _compat.stack_p:
        return [(user.outs[0], axis + (user.params["axis"] <= axis))]
    if primitive is p.dynamic_slice_p and position == 0:
        if user.outs[0].shape[axis] == user.ins[0].shape[axis]:
            return [(user.outs[0], axis)]
        raise Miss("dynamic_slice cuts the wide axis", user, matched)
    if primitive not in axis_rules:
        raise Miss(f"{primitive} is not known to consume logits", user, matched)
    if primitive is p.reshape_p:
        merged = _merged(user, axis)
        if merged is not None:
            return [(user.outs[0], merged)]
    found = []
    for output, out in enumerate(user.outs):
        result = result_axis(user, position, axis, output)
        if result is not None:
            found.append((out, result[0]))
    if not found:
        raise Miss(f"{primitive} cuts or mixes the wide axis", user, matched)
    return found


def _gathers(user: Node, axis: int) -> bool:
    """Whether it joins the logits of all devices along the vocabulary."""
    params = user.params
    return (
        user.primitive is p.all_gather_p
        and params["tiled"]
        and params["all_gather_dimension"] == axis
        and params["axis_index_groups"] is None
    )


def _is_multiplied(value: Value, uses: Uses) -> bool:
    """Whether numbers that were looked up go into a product soon: scores of an attention."""
    seen, stack = {value}, [value]
    while stack and len(seen) < 64:
        for user, position in uses.users(stack.pop()):
            if user.primitive is p.dot_general_p and not is_one_hot(user.ins[1 - position]):
                return True
            for out in user.outs:
                if out not in seen and not user.bodies and jnp.issubdtype(out.dtype, jnp.floating):
                    seen.add(out)
                    stack.append(out)
    return False


def _merged(user: Node, axis: int) -> int | None:
    """The axis to which a reshape merges the beams and, as the last of them, the vocabulary."""
    old, new = user.ins[0].shape, user.outs[0].shape
    for i, size in enumerate(new):
        behind = math.prod(new[i + 1 :]) == math.prod(old[axis + 1 :])
        if size > old[axis] and size % old[axis] == 0 and behind:
            return i
    return None


def _reduced(user: Node, axis: int) -> list[tuple[Value, int]]:
    """Behind a reduction, a sort or a scan along some axis: gone if it is the vocabulary's."""
    params = user.params
    gone = params.get("axes", params.get("dimensions"))
    if gone is not None:
        kept = axis - sum(i < axis for i in gone)
        return [] if axis in gone else [(out, kept) for out in user.outs]
    rank = len(user.ins[0].shape)
    along = params.get("axis", params.get("dimension", params.get("reduction_dimension", rank - 1)))
    return [] if along % rank == axis else [(out, axis) for out in user.outs]


def _stored(user: Node, position: int, axis: int, matched: int) -> list[tuple[Value, int]]:
    """Behind a scatter, into the logits or of the logits into a buffer."""
    if position == 0:
        return [(user.outs[0], axis)]
    numbers = user.params["dimension_numbers"]
    inserted = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    window = [i for i in range(len(user.outs[0].shape)) if i not in inserted]
    if position == 2 and axis in numbers.update_window_dims:
        return [(user.outs[0], window[numbers.update_window_dims.index(axis)])]
    raise Miss(f"{user.primitive} scatters along the wide axis", user, matched)


def _gathered(user: Node, position: int, axis: int) -> list[tuple[Value, int]]:
    """Behind a gather: a lookup of some logits, or whole rows of them (beam search)."""
    numbers, sizes = user.params["dimension_numbers"], user.params["slice_sizes"]
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    if position != 0 or axis in gone or sizes[axis] != user.ins[0].shape[axis]:
        return []
    kept = [i for i in range(len(sizes)) if i not in gone]
    return [(user.outs[0], numbers.offset_dims[kept.index(axis)])]


def _enter(user: Node, value: Value, axis: int) -> list[tuple[Value, int]]:
    """Into the bodies of a loop or a branch."""
    found = []
    for body in user.bodies:
        for inner, link in zip(body.scope.inputs, body.inputs, strict=True):
            if link.outer is value:
                found.append((inner, axis - 1 if link.role == "slice" else axis))
    return [(inner, a) for inner, a in found if a >= 0]


def _leave(value: Value, axis: int) -> list[tuple[Value, int]]:
    """Out of the body of a loop or a branch, and on to its next iteration."""
    node = value.scope.parent
    if node is None:
        return []
    found = []
    for body in node.bodies:
        for result, output in zip(body.scope.outputs, body.outputs, strict=True):
            if result is not value:
                continue
            stacked = node.primitive is p.scan_p and not output.feeds
            if output.outer is not None:
                found.append((node.outs[output.outer], axis + 1 if stacked else axis))
            for b, i in output.feeds:
                found.append((node.bodies[b].scope.inputs[i], axis))
    return found
